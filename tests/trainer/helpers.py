"""Rows, models and a run of a few steps, for every trainer's tests."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import trl
from trl import SFTConfig, SFTTrainer

DEFAULTS = {
    "report_to": "none",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
WORDS = "the cat sat on a mat and saw two red birds fly over old stone walls by a quiet river".split()


def _words(seed: int) -> Callable[[int, int], str]:
    """Texts of so many words, at least, and fewer than so many."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return words


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of uneven lengths."""
    words = _words(seed)
    return [
        {"messages": [{"role": "user", "content": words(2, 12)}, {"role": "assistant", "content": words(1, 25)}]}
        for _ in range(count)
    ]


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with a better and a worse answer; some prompts come twice."""
    words = _words(seed)
    prompts = [words(2, 12) for _ in range(count)]
    prompts[count // 2] = prompts[0]
    prompts[-1] = prompts[1]
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": f"yes {words(1, 15)}"}],
            "rejected": [{"role": "assistant", "content": f"no {words(1, 15)}"}],
        }
        for prompt in prompts
    ]


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same prompts with one answer each, good or bad."""
    rows = pair_rows(count, seed)
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if index % 3 == 0 else "chosen"], "label": index % 3 > 0}
        for index, row in enumerate(rows)
    ]


def step_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Solutions of one to three steps, each right or wrong."""
    words = _words(seed)
    return [
        {
            "prompt": words(2, 9),
            "completions": [words(1, 9) for _ in range(1 + index % 3)],
            "labels": [(index + step) % 2 == 0 for step in range(1 + index % 3)],
        }
        for index in range(count)
    ]


def tiny(tokenizer: Any, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(tokenizer, **changes))


def tiny_scorer(tokenizer: Any, seed: int = 0, per_token: bool = False) -> Any:
    torch.manual_seed(seed)
    if per_token:
        return LlamaForTokenClassification(tiny_config(tokenizer, num_labels=2))
    return LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))


def tiny_config(tokenizer: Any, **changes: Any) -> LlamaConfig:
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**{**fields, **changes})


def sft(
    tmp_path: Any,
    model: Any,
    tokenizer: Any,
    rows: Any,
    peft_config: Any = None,
    eval_rows: Any = None,
    **settings: Any,
) -> SFTTrainer:
    config = SFTConfig(**{**DEFAULTS, "output_dir": str(tmp_path), "assistant_only_loss": True, **settings})
    return SFTTrainer(
        model, config, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer, peft_config=peft_config
    )


def preference(
    method: str,
    tmp_path: Any,
    model: Any,
    tokenizer: Any,
    rows: Any,
    ref_model: Any = None,
    peft_config: Any = None,
    eval_rows: Any = None,
    reward_funcs: Any = None,
    **settings: Any,
) -> Any:
    """A trainer of judged completions: `method` is the beginning of its name, as in DPO."""
    config = getattr(trl, f"{method}Config")(**{**DEFAULTS, "output_dir": str(tmp_path), **settings})
    further = {} if ref_model is None else {"ref_model": ref_model}
    further |= {} if reward_funcs is None else {"reward_funcs": reward_funcs}
    if method == "Reward":
        tokenizer = copy.deepcopy(tokenizer)  # its padding may change, and with it the next tiny model
    return getattr(trl, f"{method}Trainer")(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        **further,
    )


def first_gradient(trainer: Any) -> dict[str, torch.Tensor]:
    """The gradient of the first optimizer step, as the optimizer sees it (before clipping)."""
    kept: dict[str, torch.Tensor] = {}
    original = trainer._get_grad_norm

    def keep(model: Any, grad_norm: Any = None) -> Any:
        if not kept:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    kept[name] = parameter.grad.clone()
        return original(model, grad_norm)

    trainer._get_grad_norm = keep
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    return kept
