"""The collator of older scripts that finds completions by a template."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


class DataCollatorForCompletionOnlyLM:
    """Trains on the tokens after the last response template of a row, found by its token ids.

    Prefer rows of prompt and completion, or `assistant_only_loss`: they use positions and cannot fail. Returns
    `input_ids`, `labels` and `attention_mask` [B, L], right-padded.

    Args:
        response_template: a text, or its token ids.
        instruction_template: a text, or its token ids. If given, every response up to the next instruction is trained.
            None by default.
        tokenizer: the tokenizer. It is required.
        mlm: must be False, the default.
        ignore_index: the label of tokens that are not trained; -100 by default.
        padding_free: has no effect, because trainers lay out rows themselves.

    Raises `TypeError` without a tokenizer, and `ValueError` for `mlm` and for a row without the template, which it
    names. Older libraries print a warning there and train on nothing.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
    ) -> None:
        if tokenizer is None:
            raise TypeError("DataCollatorForCompletionOnlyLM needs tokenizer=")
        if mlm:
            raise ValueError("mlm=True is masked-language modelling, which a causal model does not do")
        self.tokenizer, self.ignore_index = tokenizer, ignore_index
        self.response, self.instruction = (
            None if template is None else self._ids(template) for template in (response_template, instruction_template)
        )

    def _ids(self, template: str | Sequence[int]) -> list[int]:
        if isinstance(template, str):
            return self.tokenizer.encode(template, add_special_tokens=False)
        return list(template)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), self.ignore_index)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            tokens = list(row["input_ids"])
            ids[number, : len(tokens)] = torch.tensor(tokens)
            mask[number, : len(tokens)] = 1
            for start, end in self._responses(tokens, row.get("row", number)):
                labels[number, start:end] = ids[number, start:end]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def _responses(self, tokens: list[int], row: int) -> list[tuple[int, int]]:
        assert self.response is not None
        starts = [at + len(self.response) for at in _find(tokens, self.response)]
        if not starts:
            text = self.tokenizer.decode(self.response)
            raise ValueError(
                f"row {row}: the response template {text!r} is not in its tokens. Tokenizers cut the same text "
                "differently in context: pass the template's token ids as they stand in a row, or use rows of prompt "
                "and completion"
            )
        if self.instruction is None:
            return [(starts[-1], len(tokens))]
        ends = [*_find(tokens, self.instruction), len(tokens)]
        return [(start, min(end for end in ends if end >= start)) for start in starts]


def _find(tokens: list[int], piece: list[int]) -> list[int]:
    """The places in `tokens` at which `piece` begins."""
    return [at for at in range(len(tokens) - len(piece) + 1) if tokens[at : at + len(piece)] == piece]
