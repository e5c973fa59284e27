"""Collators of older releases, for loops of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tensors import pad

IGNORED = -100


@dataclass
class DPODataCollatorWithPadding:
    """Rows whose keys end in `_input_ids`, `_attention_mask` or `_labels`, as padded tensors [B, T].

    Keys that begin with `prompt` are padded on the left, the others on the right. Keys that end in `_logps` become
    tensors [B]; all others stay lists.
    """

    pad_token_id: int = 0
    label_pad_token_id: int = IGNORED
    is_encoder_decoder: bool | None = False

    def __post_init__(self) -> None:
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder: encoder-decoders are not supported, leave it out")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        fillings = {"_input_ids": self.pad_token_id, "_attention_mask": 0, "_labels": self.label_pad_token_id}
        batch: dict[str, Any] = {}
        for key in features[0]:
            rows = [row[key] for row in features]
            filling = next((value for ending, value in fillings.items() if key.endswith(ending)), None)
            if filling is not None:
                tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
                batch[key] = pad(tensors, filling, "left" if key.startswith("prompt") else "right")
            else:
                batch[key] = torch.tensor(rows) if key.endswith("_logps") else rows
        return batch


@dataclass
class RewardDataCollatorWithPadding:
    """Rows of `input_ids_chosen`, `attention_mask_chosen` and the same of `rejected`, maybe `margin`, padded by the
    tokenizer. `return_loss` is there for `Trainer`."""

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"return_loss": True}
        for side in ("chosen", "rejected"):
            names = [f"{name}_{side}" for name in ("input_ids", "attention_mask")]
            for name in names:
                if name not in features[0]:
                    raise ValueError(f"the rows have no `{name}`: this collator reads {', '.join(names)}")
            rows = [{name: row[f"{name}_{side}"] for name in ("input_ids", "attention_mask")} for row in features]
            padded = self.tokenizer.pad(
                rows,
                padding=self.padding,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
            )
            batch |= {f"{name}_{side}": padded[name] for name in ("input_ids", "attention_mask")}
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in features])
        return batch


@dataclass
class DataCollatorForChatML:
    """Conversations as left-padded tensors [B, T]: `input_ids`, `attention_mask`, `labels` of the last turn alone, and
    `prompts` with `prompt_attention_mask`, which end before the last turn.

    `messages_key` has the messages of a row, whose last one is the assistant's. `prompt_key` may have a rendered
    prompt. Rows longer than `max_length` (None: no limit) lose their beginning.
    """

    tokenizer: Any
    ignore_index: int = IGNORED
    max_length: int | None = None
    prompt_key: str = "prompt"
    messages_key: str = "messages"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        prompts, texts, labels = [], [], []
        for row in examples:
            messages = row[self.messages_key]
            rendered = row.get(self.prompt_key)
            if not isinstance(rendered, str):
                rendered = self._render(messages[:-1], add_generation_prompt=True)
            prompt, whole = self._ids(rendered), self._ids(self._render(messages))
            trained = [*[self.ignore_index] * len(prompt), *whole[len(prompt) :]]
            if self.max_length is not None:
                prompt = prompt[-max(self.max_length - (len(whole) - len(prompt)), 1) :]
                whole, trained = whole[-self.max_length :], trained[-self.max_length :]
            prompts.append(torch.tensor(prompt))
            texts.append(torch.tensor(whole))
            labels.append(torch.tensor(trained))

        def mask(rows: list[Tensor]) -> Tensor:
            return pad([torch.ones_like(row) for row in rows], 0, "left")

        filling = self.tokenizer.pad_token_id
        return {
            "input_ids": pad(texts, filling, "left"),
            "attention_mask": mask(texts),
            "labels": pad(labels, self.ignore_index, "left"),
            "prompts": pad(prompts, filling, "left"),
            "prompt_attention_mask": mask(prompts),
        }

    def _render(self, messages: Any, **more: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
