"""A run as its plan sees it: what takes memory and time."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

PAIRS = ("dpo", "orpo", "cpo", "reward")
SAMPLED = ("grpo", "rloo", "ppo", "online-dpo", "xpo", "nash-md", "distillation", "minillm")
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Run:
    """A run of `method` on a model of the shape that `config` describes.

    Args:
        config: the model's configuration.
        method: the key of the method in `trl.methods`.
        dtype: of the weights; `autocast`: of products, where it differs from the weights'.
        adapter: PEFT's configuration of an adapter, or None: all weights train.
        bits: 4 or 8 where frozen weights are quantised, else 0. `nested`: the scales of the 4-bit blocks are, too.
        rows: rows of a micro-batch on one process (samples, pairs, labelled completions).
        accumulation: micro-batches of an optimizer step on one process.
        processes: how many; `sharding`: one of `SHARDINGS`, for more than one.
        prompt, completion: tokens of each. Without completions of its own, a row of SFT has their sum.
        trained: the share of tokens that are trained, in SFT.
        budget: tokens of a micro-batch, in methods that sample; `generations`: completions of a prompt.
        checkpointing, offloading: activations are recomputed, or kept on the host.
        optim: the name in `TrainingArguments.optim`.
        frozen: configurations of further models that are held whole: reward models, teachers.
        critic: a value model of its own.
        has_reference: whether log-probs of a reference are needed.
        head: "CausalLM", or "SequenceClassification" and the like for models that score.
        steps: optimizer steps, if they are known; `tokens`: tokens of all of them, if they are known.
    """

    config: PreTrainedConfig
    method: str = "sft"
    dtype: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = None
    adapter: Any = None
    bits: int = 0
    nested: bool = False
    rows: int = 1
    accumulation: int = 1
    processes: int = 1
    sharding: str = "ddp"
    prompt: int = 1024
    completion: int = 1024
    trained: float = 1.0
    budget: int = 16384
    generations: int = 8
    checkpointing: bool = True
    offloading: bool = False
    optim: str = "adamw_torch_fused"
    frozen: tuple[PreTrainedConfig, ...] = ()
    critic: bool = False
    has_reference: bool = False
    head: str = "CausalLM"
    steps: int | None = None

    @property
    def samples(self) -> bool:
        return self.method in SAMPLED

    @property
    def tokens_of_row(self) -> int:
        """Tokens that a row is computed on: a prompt once for its completions."""
        return self.prompt + self.completion * (2 if self.method in PAIRS else 1)

    @property
    def tokens_of_micro_batch(self) -> int:
        if not self.samples:
            return self.tokens_of_row * self.rows
        longest = self.prompt + self.completion
        return max(longest, min(self.budget, self.rows * self.accumulation * longest))

    @property
    def tokens_of_step(self) -> int:
        """Tokens of an optimizer step on one process."""
        if not self.samples:
            return self.tokens_of_row * self.rows * self.accumulation
        completions = self.rows * self.accumulation
        return completions * self.completion + -(-completions // self.generations) * self.prompt
