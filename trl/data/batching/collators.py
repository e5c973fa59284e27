"""Collators that pad, with the names of upstream TRL, for users' own loops. Our trainers do not use them.

Each takes a list of tokenised rows and returns right-padded tensors, [rows, longest row]. `pad_token_id` fills up
`input_ids`. `pad_to_multiple_of` (None by default) widens the tensors to a multiple. `return_tensors` can only be "pt".
Other values raise `ValueError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of tokens that are not trained


@dataclass
class DataCollatorForLanguageModeling:
    """Rows of `input_ids`, maybe with `labels`; without them all tokens are trained."""

    pad_token_id: int
    padding_free: bool = False
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.padding_free or self.return_position_ids:
            raise ValueError(
                "padding_free and return_position_ids belong to a trainer's own batches, which are never padded: leave "
                "them out, and leave the collator out to train without padding"
            )
        _check_torch(self.return_tensors)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [list(row["input_ids"]) for row in rows]
        labels = [list(row.get("labels", row["input_ids"])) for row in rows]
        return {
            "input_ids": padded(ids, self.pad_token_id, self.pad_to_multiple_of),
            "labels": padded(labels, IGNORED, self.pad_to_multiple_of),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, self.pad_to_multiple_of),
        }


@dataclass
class DataCollatorForPreference:
    """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`: first all chosen texts, then all rejected ones.

    A text longer than `max_length` (None by default: no limit) is cut; `truncation_mode` says which end stays,
    "keep_start" (the default) or "keep_end".
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_torch(self.return_tensors)
        _check_mode(self.truncation_mode)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        found = self._prompts_with_completions(texts)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if rows and name in rows[0]:
                found[name] = torch.tensor([row[name] for row in rows])
        return found

    def _prompts_with_completions(self, texts: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        return _prompted(texts, self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of)


@dataclass
class DataCollatorForPairs:
    """Rows of `chosen_ids` and `rejected_ids`, which contain the prompt, and maybe `margin`.

    In upstream TRL it is `reward_trainer.DataCollatorForPreference`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_torch(self.return_tensors)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [list(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        found = {
            "input_ids": padded(ids, self.pad_token_id, self.pad_to_multiple_of),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, self.pad_to_multiple_of),
        }
        if rows and "margin" in rows[0]:
            found["margin"] = torch.tensor([float(row["margin"]) for row in rows])
        return found


@dataclass
class DataCollatorForUnpairedPreference:
    """Rows of `prompt_ids`, `completion_ids` and `label`.

    They may have `KL_completion_ids` (a completion of another prompt) and log-probs of the reference. A text longer
    than `max_length` (None by default: no limit) loses its end.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_torch(self.return_tensors)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for column, prefix in (("completion_ids", ""), ("KL_completion_ids", "KL_")):
            if rows and column in rows[0]:
                texts = [(row["prompt_ids"], row[column]) for row in rows]
                laid = _prompted(texts, self.pad_token_id, self.max_length, "keep_start", self.pad_to_multiple_of)
                found.update({f"{prefix}{name}": values for name, values in laid.items()})
        for name in ("ref_logps", "ref_KL_logps"):
            if rows and name in rows[0]:
                found[name] = torch.tensor([row[name] for row in rows])
        found["label"] = torch.tensor([bool(row["label"]) for row in rows])
        return found


def padded(rows: Sequence[Sequence[int]], value: int, multiple: int | None = None) -> Tensor:
    """The rows as one tensor [rows, width], filled up on the right with `value`.

    The width is that of the longest row, or the next multiple of `multiple`.
    """
    width = max(map(len, rows), default=0)
    if multiple:
        width = -(-width // multiple) * multiple
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _prompted(
    texts: Sequence[tuple[Any, Any]], pad_id: int, max_length: int | None, mode: str, multiple: int | None
) -> dict[str, Tensor]:
    kept = slice(-max_length, None) if max_length and mode == "keep_end" else slice(max_length)
    ids = [[*prompt, *completion][kept] for prompt, completion in texts]
    trained = [[*[0] * len(prompt), *[1] * len(completion)][kept] for prompt, completion in texts]
    return {
        "input_ids": padded(ids, pad_id, multiple),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, multiple),
        "completion_mask": padded(trained, 0, multiple),
    }


def _check_torch(return_tensors: str) -> None:
    if return_tensors != "pt":
        raise ValueError(f"return_tensors={return_tensors!r}: these collators give torch tensors, 'pt'")


def _check_mode(mode: str) -> None:
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode={mode!r} is neither keep_start nor keep_end")
