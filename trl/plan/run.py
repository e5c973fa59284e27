"""A run as its plan sees it: what takes memory and time."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from trl.models.low_bits import OUTSIDE_THEIR_STEP

PAIRS = ("dpo", "orpo", "cpo", "reward")
SAMPLED = ("grpo", "rloo", "ppo", "online-dpo", "xpo", "nash-md", "distillation", "minillm")
COMPARED = ("online-dpo", "xpo", "nash-md")  # a row is a prompt with two completions
TAUGHT = ("gkd", "distillation", "minillm")
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Run:
    """A run of `method` on a model of the shape that `config` describes.

    Args:
        config: the model's configuration.
        method: the key of the method in `trl.methods`.
        dtype: of the weights; `autocast`: of products under autocast, or None.
        adapter: PEFT's configuration of an adapter, or None: all weights train.
        bits: 4 or 8 where frozen weights are quantised, else 0. `nested`: the scales of the 4-bit blocks are, too.
        rows: rows of a micro-batch on one process (samples, pairs, labelled completions).
        accumulation: micro-batches of an optimizer step on one process.
        processes: how many; `sharding`: one of `SHARDINGS`, for more than one.
        prompt, completion: tokens of each. Without completions of its own, a row of SFT has their sum.
        trained: the share of tokens that are trained, in SFT.
        budget: tokens of a micro-batch, in methods that sample; `generations`: completions of a prompt.
        shares: whether a prompt is computed once for its completions.
        checkpointing, offloading: activations are recomputed, or kept on the host.
        optim: the name in `TrainingArguments.optim`.
        teacher: the configuration of a teacher; `frozen`: those of reward models, which are held whole.
        critic: the configuration of a value model of its own. Without one, PPO has a head on the policy.
        has_reference: whether log-probs of a reference are needed.
        head: "CausalLM", "SequenceClassification" or "TokenClassification".
        steps: optimizer steps, if they are known.
        device: "cuda", or "cpu".
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
    shares: bool = True
    checkpointing: bool = True
    offloading: bool = False
    optim: str = "adamw_torch_fused"
    teacher: PreTrainedConfig | None = None
    frozen: tuple[PreTrainedConfig, ...] = ()
    critic: PreTrainedConfig | None = None
    has_reference: bool = False
    head: str = "CausalLM"
    steps: int | None = None
    device: str = "cuda"

    def having(self, **changes: Any) -> "Run":
        """This run with other values."""
        return replace(self, **changes)

    @property
    def samples(self) -> bool:
        return self.method in SAMPLED

    @property
    def held_in_float32(self) -> bool:
        """Whether weights that train are cast to float32, because their lower halves cannot be kept (see
        `models.low_bits.hold_in_float32`)."""
        outside = any(word in self.optim for word in OUTSIDE_THEIR_STEP)
        return self.dtype == torch.float16 or (outside and self.dtype == torch.bfloat16)

    @property
    def has_value_head(self) -> bool:
        return self.method == "ppo" and self.critic is None

    @property
    def tokens_of_row(self) -> int:
        """Tokens that a row is computed on: a prompt once for its completions."""
        if self.method not in PAIRS:
            return self.prompt + self.completion
        return self.prompt * (1 if self.shares else 2) + self.completion * 2

    @property
    def completions_of_step(self) -> int:
        """Completions that one process trains on in an optimizer step, in methods that sample."""
        return self.rows * self.accumulation

    @property
    def tokens_of_micro_batch(self) -> int:
        if not self.samples:
            return self.tokens_of_row * self.rows
        return max(self.prompt + self.completion, min(self.budget, self.tokens_of_step))

    @property
    def tokens_of_step(self) -> int:
        """Tokens of an optimizer step on one process."""
        if not self.samples:
            return self.tokens_of_row * self.rows * self.accumulation
        completions = self.completions_of_step
        prompts = -(-completions // self.generations) if self.shares else completions
        return completions * self.completion + prompts * self.prompt

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier micro-batches are there while a micro-batch runs backward."""
        if not self.samples:
            return self.accumulation > 1
        return self.tokens_of_step > self.tokens_of_micro_batch
