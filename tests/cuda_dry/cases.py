"""The trainers and the options of the dry runs, on tiny models of many tokens."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import trl
from tests.parity.tiny import tokenizer
from trl.rollout.traces import TrainingTrace

VOCABULARY, LONGEST = 4096, 640  # tokens of the vocabulary, and of the longest sequence
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 100}),
    "softcap": ("gemma2", {"sliding_window": 100, "query_pre_attn_scalar": 16}),
    "sinks": ("gpt_oss", {"sliding_window": 100, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "MoE": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}


class Option(NamedTuple):
    """One row of the table beside its trainer."""

    family: str = "llama"
    settings: dict[str, Any] = {}
    adapter: bool = False
    float32: bool = False  # weights, with autocast
    four_bits: bool = False


PLAIN = {"gradient_checkpointing": False}
OPTIONS = {
    "bf16": Option(settings=PLAIN),
    "autocast": Option(settings={**PLAIN, "bf16": True}, float32=True),
    "LoRA": Option(settings=PLAIN, adapter=True),
    "checkpointing": Option(settings={"gradient_checkpointing": True}),
    "checkpointing, reentrant": Option(
        settings={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    "checkpointing, selective": Option(
        settings={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    ),
    "LoRA, autocast, checkpointing": Option(
        settings={"gradient_checkpointing": True, "bf16": True}, adapter=True, float32=True
    ),
    "LoRA, 4 bits": Option(settings={"gradient_checkpointing": True}, adapter=True, four_bits=True),
    "window": Option("window", PLAIN),
    "softcap": Option("softcap", PLAIN),
    "softcap, selective": Option(
        "softcap", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    ),
    "sinks": Option("sinks", PLAIN),
    "sinks, LoRA, autocast": Option("sinks", {**PLAIN, "bf16": True}, adapter=True),
    "MoE": Option("MoE", PLAIN),
}
SOME = ("bf16", "LoRA, autocast, checkpointing")


# --- models -------------------------------------------------------------------------------------------------------


class FourBits(nn.Linear):
    """A stand-in for a layer of 4-bit weights: two of them a byte, unpacked in the forward pass."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        packed = torch.zeros(layer.out_features * layer.in_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat([self.weight >> 4, self.weight & 15], 1).to(x.dtype)
        return nn.functional.linear(x, (halves / 8 - 1).view(self.out_features, self.in_features))


def model_of(option: Option, kind: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    family, settings = FAMILIES[option.family]
    config = AutoConfig.for_model(family, **{**SMALL, **settings, **changes})
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32 if option.float32 else torch.bfloat16)
    if option.four_bits:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and name not in ("lm_head", "score"):
                    setattr(module, name, FourBits(child))
    return model


def adapter_of(option: Option) -> Any:
    if not option.adapter:
        return None
    from peft import LoraConfig

    # Layers of experts are parameters, not modules.
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


# --- rows ---------------------------------------------------------------------------------------------------------


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 24, count).tolist()


def sequences() -> list[dict[str, Any]]:
    lengths = (LONGEST, 600, 300, LONGEST)
    return [{"input_ids": ids(n, row), "loss_mask": [0] * 20 + [1] * (n - 20)} for row, n in enumerate(lengths)]


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt_ids": ids(40, row), "chosen_ids": ids(600, row + 10), "rejected_ids": ids(420, row + 20)}
        for row in range(3)
    ]


def unpaired() -> list[dict[str, Any]]:
    return [
        {"prompt_ids": ids(40, row), "completion_ids": ids(600, row + 10), "label": row % 2 == 0} for row in range(4)
    ]


def with_mismatched() -> list[dict[str, Any]]:
    return [{**row, "kl_completion_ids": ids(500, 30 + index)} for index, row in enumerate(unpaired())]


def solutions() -> list[dict[str, Any]]:
    mask = [int(place % 100 == 99) for place in range(600)]
    return [
        {"prompt_ids": ids(40, row), "completion_ids": ids(600, row + 10), "step_mask": mask, "step_labels": [1, 0] * 3}
        for row in range(3)
    ]


def traces(trainer: Any) -> list[TrainingTrace]:
    """Two prompts with four completions each, and everything that a loss may read of them."""
    found = []
    for number in range(8):
        length, row = 600 - 40 * (number % 3), number // 4
        own = np.random.default_rng(number)
        columns: dict[str, Any] = {"ids": np.array(ids(length, 50 + number), dtype=np.int32)}
        for name in ("logps", "ref_logps", "old_logps", "values", "returns", "advantages"):
            columns[name] = own.normal(size=length).astype(np.float32)
        advantage = (1.0, -1.0)[number % 2]
        found.append(TrainingTrace(row, ids(40, row), length, advantage, length, columns))
    return found


# --- trainers -----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How a trainer is made: rows, and what is not the same for all."""

    rows: Callable[[], list[dict[str, Any]]] | None  # None: it draws completions
    settings: dict[str, Any] = {}
    further: Callable[[Option], dict[str, Any]] = lambda option: {}
    scores: Any = None  # the class of a model that scores
    options: tuple[str, ...] = SOME


def _judged(option: Option) -> dict[str, Any]:
    return {"reward_funcs": lambda completions, **_: [float(len(each)) for each in completions]}


def _teacher(option: Option) -> dict[str, Any]:
    return {"teacher_model": model_of(option)}


KINDS = {
    "SFT": Kind(sequences, options=tuple(OPTIONS)),
    "DPO": Kind(pairs, options=tuple(OPTIONS)),
    "KTO": Kind(with_mismatched),
    "ORPO": Kind(pairs),
    "CPO": Kind(pairs),
    "BCO": Kind(unpaired),
    "Reward": Kind(pairs, scores=AutoModelForSequenceClassification),
    "PRM": Kind(solutions, scores=AutoModelForTokenClassification),
    "GKD": Kind(sequences, {"lmbda": 0.0}, _teacher),
    "GRPO": Kind(None, {"num_generations": 4, "beta": 0.1}, _judged, options=tuple(OPTIONS)),
    "RLOO": Kind(None, {"num_generations": 4}, _judged),
    "PPO": Kind(None, {}, _judged),
    "OnlineDPO": Kind(None, {}, _judged),
    "XPO": Kind(None, {}, _judged),
    "NashMD": Kind(None, {}, _judged),
    "MiniLLM": Kind(None, {"num_generations": 4}, _teacher),
    "Distillation": Kind(None, {}, _teacher),
}


SAMPLED = ("bf16", "autocast", "LoRA", "window", "softcap", "sinks", "MoE")  # options of the sampler


def every_case() -> list[tuple[str, str]]:
    """Trainer (or `sampler`) and option."""
    cases = [(name, option) for name, kind in KINDS.items() for option in kind.options]
    return [*cases, *(("sampler", option) for option in SAMPLED)]


def trainer_of(name: str, option_name: str, folder: Path) -> Any:
    kind, option = KINDS[name], OPTIONS[option_name]
    settings = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "save_strategy": "no",
                "disable_tqdm": True, "per_device_train_batch_size": 8, "max_steps": 1, **kind.settings,
                **option.settings}  # fmt: skip
    args = getattr(trl, f"{name}Config")(**settings)
    if kind.rows is None:
        data: Any = [{"prompt": "w5 w6"}, {"prompt": "w7"}] * 4
    else:
        data = Dataset.from_list([{**row, "row": index} for index, row in enumerate(kind.rows())])
    changes = {"num_labels": 1 if name == "Reward" else 2} if kind.scores else {}
    model = model_of(option, kind.scores or AutoModelForCausalLM, **changes)
    with contextlib.redirect_stdout(None):
        trainer = getattr(trl, f"{name}Trainer")(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=adapter_of(option),
            **kind.further(option),
        )  # fmt: skip
    return trainer
