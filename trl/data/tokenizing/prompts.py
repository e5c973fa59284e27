"""Prompts that a model answers in training: token ids, and the columns that reward functions read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape, part_to_column
from trl.data.reading.messages import is_conversation, messages_of, place, text_of
from trl.data.report import PromptReport, show
from trl.data.tokenizing import recipe
from trl.data.tokenizing.encode import Encoder, Text, Tokens
from trl.data.tokenizing.recipe import Recipe

# Where the prompt is: the first of these columns that the data have.
COLUMNS = ("prompt", "messages", "conversations", "question", "problem", "instruction", "query", "input", "text")
TOKENS = "input_ids"  # else here, as token ids
OPTIONS = ("tools", "chat_template_kwargs")  # columns that the chat template is given
PREPARED = ("prompt", "prompt_ids", "row")  # columns of a prepared row that are not the data's own


def prepare_prompts(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    num_proc: int | None = None,
    look_at: int = 1000,
    **options: Any,
) -> tuple[Any, PromptReport]:
    """Tokenises prompts. `options` are the fields of `Prompts`; the other arguments are those of `recipe.prepare`.

    Returns the rows with the columns `prompt` (a string or a list of messages), `prompt_ids` (token ids), `row` (index
    in `dataset`) and all other columns of the data, and the report. Raises `DataError` as `recipe.prepare` does.
    """
    prompts = Prompts(**options)
    return recipe.prepare(prompts, dataset, tokenizer, name=name, num_proc=num_proc, look_at=look_at)


@dataclass(frozen=True, kw_only=True)
class Prompts(Recipe):
    """Rows to prompts that a model continues. All other columns of the rows are kept for the reward functions.

    A conversation goes through the chat template, with the generation prompt, the row's `tools` and its
    `chat_template_kwargs`. An assistant's message at its end is left out. A string is tokenised as it is; a beginning
    of text that is written in it is not added again.

    Args:
        columns: new names for columns, for the prompt and for what reward functions read: `{"prompt": "task"}` or
            `{"task": "prompt"}`. None (the default) keeps the names.
        max_prompt_length: the most tokens of a prompt, at least 1. A longer one loses its beginning. None (the
            default): no limit.
        chat_template_kwargs: further arguments of the chat template. Those of a row take precedence over them.
    """

    max_prompt_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    counters: ClassVar[tuple[str, ...]] = ("_dropped", "_length", "_bos_doubled")
    keeps_columns: ClassVar[bool] = True

    def rename(self, rows: Any, names: Sequence[str]) -> Any:
        if not self.columns:
            return rows
        new = {column: part for part, column in part_to_column(self.columns, names).items() if part != column}
        missing = [column for column in new if column not in names]
        if missing:
            raise DataError(
                f"columns={dict(self.columns)} names {', '.join(map(repr, missing))}, but the columns are "
                f"{', '.join(names)}."
            )
        replaced = [part for part in new.values() if part in names and part not in new]
        return (rows.remove_columns(replaced) if replaced else rows).rename_columns(new)

    def detect(self, dataset: datasets.Dataset) -> Shape:
        column = next((each for each in COLUMNS if each in dataset.column_names), None)
        if column is None and TOKENS in dataset.column_names:
            return Shape("prompts", {"prompt": TOKENS}, False, f"`{TOKENS}` read as prompts that are tokenised")
        if column is None:
            raise DataError(
                f"Cannot read the rows: no column holds prompts; the columns are {', '.join(dataset.column_names)}. "
                "Name one `prompt`, with `columns` (as in columns={'prompt': 'task'}) or `dataset.rename_column`."
            )
        first = dataset.with_format(None).select_columns([column])[:100][column]
        conversational = is_conversation(next((value for value in first if value), None))
        how = "conversations, through the chat template" if conversational else "strings, tokenised as they are"
        options = {each: each for each in OPTIONS if conversational and each in dataset.column_names}
        return Shape("prompts", {"prompt": column, **options}, conversational, f"`{column}` read as {how}")

    def check(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
        recipe.check_limit(self, "max_prompt_length")
        super().check(shape, tokenizer)

    def check_parts(self, reports: Sequence[PromptReport]) -> None:
        if len({report.conversational for report in reports}) > 1:
            kinds = [f"{each.name} has {'conversations' if each.conversational else 'texts'}" for each in reports]
            raise DataError(
                f"The prompts of a mix are of one kind, but {' and '.join(kinds)}. Give lists of messages in all."
            )

    def encoder(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, first_row: int = 0) -> "PromptEncoder":
        return PromptEncoder(tokenizer, shape, self, first_row)

    def aggregate(
        self,
        table: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        shape: Shape,
        name: str,
        first_row: int = 0,
    ) -> tuple[datasets.Dataset, PromptReport]:
        count = self.count(table)
        lengths: np.ndarray = count["_length"]
        prepared, _ = recipe.drop_rows(self, table, shape, name, first_row, {}, {}, ())
        sample = prepared[0]
        return prepared, PromptReport(
            name=name,
            sentence=shape.sentence,
            rows_read=len(table),
            rows_kept=len(table),
            lengths=recipe.length_summary(lengths),
            conversational=shape.conversational,
            cut=int((lengths > self.max_prompt_length).sum()) if self.max_prompt_length else 0,
            max_prompt_length=self.max_prompt_length,
            columns=[column for column in prepared.column_names if column not in PREPARED],
            bos_doubled=int(count["_bos_doubled"].sum()),
            sample=show(tokenizer, sample["prompt_ids"], [False] * len(sample["prompt_ids"])),
            sample_row=int(sample["row"]) - first_row,
        )


class PromptEncoder(Encoder):
    """Batches of rows to prompts. The other columns come back as they are, with types that are not known here."""

    features = None
    recipe: Prompts

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        column, conversational = self.shape.columns["prompt"], self.shape.conversational
        if column == TOKENS:
            prompts = self.tokenizer.batch_decode(batch[column], skip_special_tokens=True)
            rows = [Tokens(list(ids), [False] * len(ids)) for ids in batch[column]]
        else:
            prompts = [self._prompt(each, place(row, column)) for each, row in zip(batch[column], indices, strict=True)]
            texts = prompts
            if conversational:
                texts = self._render(prompts, self._template_options(batch, indices), indices, column, True)
            rows = self._tokenise([Text(text, open=True) for text in texts], plain=not conversational)
        for tokens, row in zip(rows, indices, strict=True):
            if not tokens.ids:
                raise DataError(f"{place(row, column)} is empty: there is nothing to answer. Remove the row.")
        limit = self.recipe.max_prompt_length
        found: dict[str, list[Any]] = {
            "prompt_ids": [tokens.ids if limit is None else tokens.ids[-limit:] for tokens in rows]
        }
        if column != "prompt" or conversational:
            found["prompt"] = prompts
        return {
            **batch,
            **found,
            "row": [self.first_row + row for row in indices],
            "_dropped": [KEPT] * len(rows),
            "_length": [len(tokens.ids) for tokens in rows],
            "_bos_doubled": [int(tokens.bos_doubled) for tokens in rows],
        }

    def _prompt(self, value: Any, where: str) -> Any:
        """The prompt in a row: a string, or messages of which the last is not the assistant's answer."""
        conversational = self.shape.conversational
        if isinstance(value, str) if conversational else is_conversation(value):
            here, first = ("a string", "messages") if conversational else ("messages", "a string")
            raise DataError(f"{where} is {here} where row 0 has {first}. Give one kind in every row.")
        if not conversational:
            return text_of(value, where)
        messages = messages_of(value, where)
        return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "assistant" else messages

    def _template_options(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[dict[str, Any]] | None:
        options, further = super()._template_options(batch, indices), self.recipe.chat_template_kwargs
        if not further:
            return options
        return [{**further, **own} for own in options or [{}] * len(indices)]
