"""Rows, models and a run of a few steps, for every trainer's tests."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl import SFTConfig, SFTTrainer

WORDS = "the cat sat on a mat and saw two red birds fly over old stone walls by a quiet river".split()


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [
        {"messages": [{"role": "user", "content": words(2, 12)}, {"role": "assistant", "content": words(1, 25)}]}
        for _ in range(count)
    ]


def tiny(tokenizer: Any, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    return LlamaForCausalLM(config)


def sft(
    tmp_path: Any,
    model: Any,
    tokenizer: Any,
    rows: Any,
    peft_config: Any = None,
    eval_rows: Any = None,
    **settings: Any,
) -> SFTTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "assistant_only_loss": True,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    config = SFTConfig(**{**defaults, **settings})
    return SFTTrainer(
        model, config, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer, peft_config=peft_config
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
