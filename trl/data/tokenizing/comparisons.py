"""Comparisons: judged completions to tokens.

They are pairs with a preferred completion, single completions with a label, or solutions in steps with a label for each
step.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape, detect
from trl.data.reading.samples import EMPTY, IDENTICAL, NO_CHOICE, NO_PROMPT, PARTED
from trl.data.report import PreferenceReport, show
from trl.data.tokenizing import recipe
from trl.data.tokenizing.comparison_encoder import ALL_CUT, COUNTERS, EQUAL_CUT, KINDS, PROMPT_FILLS, ComparisonEncoder
from trl.data.tokenizing.recipe import TrainedRecipe

REASONS = {
    NO_PROMPT: "no token stands before the completion",
    EMPTY: "a completion has no token",
    IDENTICAL: "both completions are the same",
    PARTED: "the two conversations part at a turn that is not the assistant's",
    NO_CHOICE: "no response is better than another",
    EQUAL_CUT: "both completions are the same once they are cut",
    PROMPT_FILLS: "the prompt alone fills max_length",
    ALL_CUT: "every step ends beyond the cut",
}
REMEDIES = {
    NO_PROMPT: "Nothing predicts the first token of a completion without a prompt: fill the field.",
    EMPTY: "Fill the field, or leave add_eos at True.",
    IDENTICAL: "A pair needs two different completions: check the columns.",
    PARTED: "Give the prompt in a column `prompt`, and in the others the assistant's turns that follow it.",
    NO_CHOICE: "Give at least two responses with different scores.",
    EQUAL_CUT: "Raise `max_length` or `max_completion_length`.",
    PROMPT_FILLS: "Raise `max_length`, set `max_prompt_length` below it, or truncation_mode='keep_end'.",
    ALL_CUT: "Raise `max_length` or `max_completion_length`.",
}
MAIN_PARTS = (
    *("prompt", "chosen", "rejected", "completion", "responses"),
    *("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"),
)


def prepare_preferences(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    num_proc: int | None = None,
    look_at: int = 1000,
    **options: Any,
) -> tuple[Any, PreferenceReport]:
    """Tokenises judged completions. `options` are the fields of `Preferences`; `kind` is required. The other arguments
    are those of `recipe.prepare`.

    Returns a table or a stream, as `dataset` is, and the report. The columns are `prompt_ids` (token ids), `row` (index
    in `dataset`), and

    - for "pairs": `chosen_ids` and `rejected_ids` (token ids), and, if the data have them, the numbers `margin`,
      `ref_chosen_logps` and `ref_rejected_logps`;
    - for "unpaired": `completion_ids` (token ids), `label` (bool), and, if the data have it, the number `ref_logps`. A
      pair makes two rows;
    - for "steps": `completion_ids` (L token ids), `step_mask` (L bools, true at the last token of each step) and
      `step_labels` (1 or 0 for each step).

    Rows that have these columns already are only checked and cut. Raises `DataError` as `recipe.prepare` does.
    """
    preferences = Preferences(**options)
    return recipe.prepare(preferences, dataset, tokenizer, name=name, num_proc=num_proc, look_at=look_at)


@dataclass(frozen=True, kw_only=True)
class Preferences(TrainedRecipe):
    """Rows to prompts and completions.

    Args:
        kind: "pairs", "unpaired" or "steps".
        max_prompt_length: the most tokens of a prompt, which loses its beginning. None (the default): no limit.
        max_completion_length: the most tokens of a completion, which loses its end. None (the default): no limit.
        truncation_mode: how a row is cut that is then still longer than `max_length`. "keep_start" (the default) cuts
            completions at their end, and drops a row whose prompt leaves no room for them. "keep_end" cuts the prompt
            at its beginning, down to its last token if the longer completion needs the room, and then completions at
            their beginning.
        step_separator: the text after each step; a newline by default.
        train_on_last_step_only: judge only the last step. False by default.
    """

    kind: str
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    step_separator: str = "\n"
    train_on_last_step_only: bool = False

    counters: ClassVar[tuple[str, ...]] = COUNTERS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"kind={self.kind!r} is not known: choose one of {', '.join(map(repr, KINDS))}.")

    def detect(self, dataset: datasets.Dataset) -> Shape:
        kind = KINDS[self.kind]
        shape = detect(dataset, columns=self.columns, readings=kind.readings, understood=kind.understood)
        if self.kind != "unpaired" or "label" in shape.columns:
            return shape
        pairs = f"{len(dataset):,} pair{'s' if len(dataset) > 1 else ''} read as {2 * len(dataset):,} rows"
        return Shape(shape.kind, shape.columns, shape.conversational, f"{shape.sentence}; {pairs}")

    def check(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
        for option in ("max_prompt_length", "max_completion_length"):
            recipe.check_limit(self, option)
        if self.kind == "steps" and not tokenizer(self.step_separator, add_special_tokens=False)["input_ids"]:
            raise DataError(
                f"step_separator={self.step_separator!r} has no token, and its last one is where a step is judged: "
                "give a text such as '\\n'."
            )
        super().check(shape, tokenizer)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, first_row: int = 0) -> "ComparisonEncoder":
        return ComparisonEncoder(tokenizer, shape, self, first_row)

    def cut(self, prompt: int, completions: Sequence[int]) -> tuple[int, list[slice]] | None:
        """How a row is cut, for a prompt and completions of these lengths in tokens.

        Returns where the kept part of the prompt begins, and the kept slice of each completion. Returns None if the
        prompt leaves no room for completions.
        """
        begin = 0 if self.max_prompt_length is None else max(0, prompt - self.max_prompt_length)
        longest = self.max_completion_length
        ends = [length if longest is None else min(length, longest) for length in completions]
        starts = [0] * len(ends)
        over = 0 if self.max_length is None else prompt - begin + max(ends) - self.max_length
        if over > 0:
            assert self.max_length is not None
            if self.truncation_mode == "keep_end":
                begin += min(over, prompt - begin - 1)
            room = self.max_length - (prompt - begin)
            if room < 1:
                return None
            if self.truncation_mode == "keep_end":
                starts = [max(0, end - room) for end in ends]
            else:
                ends = [min(end, room) for end in ends]
        return begin, [slice(start, end) for start, end in zip(starts, ends, strict=True)]

    def aggregate(
        self,
        table: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        shape: Shape,
        name: str,
        first_row: int = 0,
    ) -> tuple[datasets.Dataset, PreferenceReport]:
        count = self.count(table)
        prepared, dropped = recipe.drop_rows(self, table, shape, name, first_row, REASONS, REMEDIES, MAIN_PARTS)
        kept = count["_dropped"] == KEPT
        prompt, first, second, prompt_kept, completions_kept, trainable, trained, empty = (
            count[counter][kept]
            for counter in ("_prompt", "_first", "_second", "_prompt_kept", "_kept", "_trainable", "_trained", "_empty")
        )
        completions = first + np.maximum(second, 0)  # -1: there is no second completion
        ends = Counter(count["_end"][kept].tolist())
        ending = sum(ends.values()) - ends.pop(-1, 0)
        limits = ("max_length", "max_prompt_length", "max_completion_length")
        labels = [label for row in prepared["step_labels"] for label in row] if self.kind == "steps" else []
        labels = prepared["label"][:] if self.kind == "unpaired" else labels
        return prepared, PreferenceReport(
            name=name,
            sentence=shape.sentence,
            rows_read=len(table),
            rows_kept=int(kept.sum()),
            tokens=int((prompt_kept + completions_kept).sum()),
            trained_tokens=int(trained.sum()),
            lengths=recipe.length_summary(prompt + np.maximum(first, second)),
            max_length=self.max_length,
            rows_cut=int(((prompt_kept < prompt) | (completions_kept < completions)).sum()),
            tokens_cut=int((prompt - prompt_kept + completions - completions_kept).sum()),
            trained_tokens_cut=int((trainable - trained).sum()),
            dropped=dropped,
            end_of_turn=ending,
            end_of_turn_token=str(tokenizer.convert_ids_to_tokens(ends.most_common(1)[0][0])) if ending else None,
            bos_doubled=int(count["_bos_doubled"].sum()),
            boundary_tokens=int(count["_straddles"][kept].sum()),
            sample=_shown(tokenizer, self.kind, prepared[0]),
            sample_row=int(prepared[0]["row"]) - first_row,
            kind=self.kind,
            prompt_lengths=recipe.length_summary(prompt),
            completion_lengths=recipe.length_summary(np.concatenate([first, second[second >= 0]])),
            limits={limit: value for limit in limits if (value := getattr(self, limit)) is not None},
            prompts_cut=int((prompt_kept < prompt).sum()),
            prompt_tokens_cut=int((prompt - prompt_kept).sum()),
            completions_cut=int((completions_kept < completions).sum()),
            completion_tokens_cut=int((completions - completions_kept).sum()),
            empty_completions=int(empty.sum()),
            labels_true=sum(map(bool, labels)),
            labels_false=len(labels) - sum(map(bool, labels)),
        )


def _shown(tokenizer: PreTrainedTokenizerBase, kind: str, row: Mapping[str, Any]) -> str:
    """The text of a prepared row on one line."""

    def text(column: str) -> str:
        return show(tokenizer, row[column], [column != "prompt_ids"] * len(row[column]))

    if kind == "pairs":
        return f"prompt {text('prompt_ids')} chosen {text('chosen_ids')} rejected {text('rejected_ids')}"
    if kind == "unpaired":
        return f"prompt {text('prompt_ids')} completion {text('completion_ids')} label {str(row['label']).lower()}"
    steps = show(tokenizer, row["completion_ids"], row["step_mask"])
    return f"prompt {text('prompt_ids')} steps {steps} labels {', '.join(map(str, row['step_labels']))}"
