"""Prompts that a model answers in training: token ids, and the columns that reward functions read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from trl.data.reading import broken
from trl.data.reading.formats import part_to_column
from trl.data.reading.messages import is_talk, messages_of, place, text_of, without_none
from trl.data.reading.sources import ORIGIN, DataError, as_shown, from_rows
from trl.data.report import show
from trl.data.tokenizing import chat
from trl.data.tokenizing.encode import bos_doubled
from trl.data.tokenizing.recipe import RECIPE

# Where the prompt is: the first of these columns that the data have.
COLUMNS = ("prompt", "messages", "conversations", "question", "problem", "instruction", "query", "input", "text")
COUNTERS = ["_length", "_bos_doubled"]  # columns of a row that become the report


@dataclass
class PromptReport:
    """What was found of the prompts: how many, how read, how long (in tokens), how many lost their beginning."""

    name: str
    sentence: str
    rows: int
    conversational: bool
    lengths: dict[str, int]
    cut: int = 0
    max_prompt_length: int | None = None
    sample: str = ""
    columns: list[str] = field(default_factory=list)
    bos_doubled: int = 0
    skipped: int = 0
    looked_at: int | None = None

    def lines(self) -> list[str]:
        """The report as plain lines."""
        lengths, further = self.lengths, ", ".join(self.columns) or "none"
        lines = [
            f"{self.name}: {self.rows:,} prompts; {self.sentence}; columns for reward functions: {further}",
            f"prompt lengths: shortest {lengths['min']:,}, median {lengths['median']:,}, longest {lengths['max']:,} "
            "tokens",
        ]
        if self.cut:
            lines.append(
                f"warning: {self.cut:,} prompts lost their beginning to fit max_prompt_length={self.max_prompt_length}"
            )
        if self.bos_doubled:
            lines.append(f"beginning of text: written in {self.bos_doubled:,} prompts already, so not added again")
        if self.looked_at is not None:
            lines.insert(1, f"this is a stream: all that is said here is of its first {self.looked_at:,} rows")
        if self.skipped:
            lines.append(f"warning: {self.skipped:,} prompts dropped: {broken.SKIPPED}")
        return [*lines, f"row 0: {self.sample}"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts."""
        return asdict(self)


def prepare_prompts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, PromptReport]:
    """The data set with `prompt` (a string or a list of messages), `prompt_ids`, `row` and its other columns.

    Conversations go through the chat template, with `add_generation_prompt`, the row's `tools` and
    `chat_template_kwargs`; strings are tokenised as they are, and one that is written with a beginning of text gets no
    second. Of conversations that end with the assistant's turn, that turn is left out. A prompt longer than
    `max_prompt_length` tokens loses its beginning. `columns` gives columns other names, for the prompts and for what
    reward functions read. Raises `DataError`, which names the row, the field and the remedy; `skip_bad_rows` leaves out
    rows that cannot be read, and counts them.
    """
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set has no rows.")
    origin = getattr(dataset, ORIGIN, (None, 0))
    dataset = _renamed(as_shown(dataset), columns, name).with_format(None)
    setattr(dataset, ORIGIN, origin)
    read = _reader(dataset, tokenizer, max_prompt_length, chat_template_kwargs, name)
    column, talk = read.column, read.talk
    prepared, bad = broken.mapped(read, dataset, skip=skip_bad_rows, num_proc=num_proc, desc=f"Tokenising {name}")
    lengths, doubled = np.array(prepared["_length"]), sum(prepared["_bos_doubled"])
    prepared = prepared.remove_columns(COUNTERS)
    how = "conversations, through the chat template" if talk else "strings, tokenised as they are"
    sentence = f"`{column}` read as {how}"
    if not talk and tokenizer.chat_template:
        sentence += " (the model has a chat template: give lists of messages to use it)"
    report = PromptReport(
        name=name,
        sentence=sentence,
        rows=len(prepared),
        conversational=talk,
        lengths={"min": int(lengths.min()), "median": round(float(np.median(lengths))), "max": int(lengths.max())},
        cut=int((lengths > max_prompt_length).sum()) if max_prompt_length else 0,
        max_prompt_length=max_prompt_length,
        sample=show(tokenizer, prepared[0]["prompt_ids"], [False] * len(prepared[0]["prompt_ids"])),
        columns=[each for each in prepared.column_names if each not in ("prompt", "prompt_ids", "row")],
        bos_doubled=doubled,
        skipped=len(bad),
    )
    return prepared, report


def prepare_prompt_stream(
    stream: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    name: str = "train",
    look_at: int = 1000,
) -> tuple[datasets.IterableDataset, PromptReport]:
    """`prepare_prompts` for a stream: prompts are tokenised as they are asked for. The report is of the first `look_at`
    rows."""
    stream = as_shown(stream)
    head = from_rows(list(stream.take(look_at)))
    if len(head) == 0:
        raise DataError(f"{name}: the stream has no rows.")
    options: dict[str, Any] = {"max_prompt_length": max_prompt_length, "chat_template_kwargs": chat_template_kwargs}
    _, report = prepare_prompts(head, tokenizer, columns=columns, skip_bad_rows=skip_bad_rows, name=name, **options)
    report.looked_at = len(head)
    stream = _renamed(stream, columns, name, head.column_names)
    read = _reader(_renamed(head, columns, name), tokenizer, max_prompt_length, chat_template_kwargs, name)
    prepared = stream.map(
        _Whole(read, skip_bad_rows),
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=stream.column_names,
    )
    return prepared, report


def prepare_prompt_mixture(
    parts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, name: str = "train", **options: Any
) -> tuple[Any, PromptReport]:
    """`prepare_prompts` for the parts of a mix, one behind the other (see `mixture.Part`). A column that only some of
    them have is None in the others."""
    columns = options.pop("columns", None)
    streams = any(isinstance(part.rows, datasets.IterableDataset) for part in parts)
    if streams:
        options.pop("num_proc", None)
    tables: list[Any] = []
    reports: list[PromptReport] = []
    for part in parts:
        prepare: Any = prepare_prompt_stream if streams else prepare_prompts
        try:
            table, report = prepare(part.rows, tokenizer, columns=part.columns or columns, name=part.label, **options)
        except DataError as error:
            raise DataError(f"{part.label}: {error}") from error
        if reports and report.conversational != reports[0].conversational:
            kinds = [
                f"{each.name} has {'conversations' if each.conversational else 'texts'}" for each in (*reports, report)
            ]
            raise DataError(
                f"The prompts of a mix are of one kind, but {' and '.join(kinds)}. Give lists of messages in all."
            )
        tables.append(table)
        reports.append(report)
    if not streams:
        tables = [table.remove_columns("row") for table in tables]
    try:
        whole = datasets.concatenate_datasets(tables)
    except (TypeError, ValueError) as error:  # Arrow's errors are kinds of these
        raise DataError(
            f"The columns of the mix do not fit together: {error}. Keep those that reward functions read, with "
            "`columns: [...]` of each data set, and give each of them one type."
        ) from error
    if not streams:
        whole = whole.add_column("row", list(range(len(whole))))
    return whole, _mixed(reports, name, whole)


def _mixed(reports: list[PromptReport], name: str, whole: Any) -> PromptReport:
    lengths = {
        "min": min(report.lengths["min"] for report in reports),
        "median": round(float(np.median([report.lengths["median"] for report in reports]))),
        "max": max(report.lengths["max"] for report in reports),
    }
    columns = dict.fromkeys(column for report in reports for column in report.columns)
    said = "; ".join(f"{report.name}: {report.rows:,}, {report.sentence}" for report in reports)
    looked = [report.looked_at for report in reports if report.looked_at is not None]
    return replace(
        reports[0],
        name=name,
        sentence=f"a mix of {len(reports)} data sets ({said})",
        rows=sum(report.rows for report in reports),
        lengths=lengths,
        cut=sum(report.cut for report in reports),
        columns=list(columns),
        bos_doubled=sum(report.bos_doubled for report in reports),
        skipped=sum(report.skipped for report in reports),
        looked_at=sum(looked) if looked else None,
    )


def _renamed(dataset: Any, columns: Mapping[str, str] | None, name: str, there: Sequence[str] | None = None) -> Any:
    """The data set with the names that `columns` gives its columns."""
    if not columns:
        return dataset
    there = list(dataset.column_names or there or ())
    new = {column: part for part, column in part_to_column(columns, there).items() if part != column}
    missing = [column for column in new if column not in there]
    if missing:
        raise DataError(
            f"{name}: columns={dict(columns)} names {', '.join(map(repr, missing))}, but the columns are "
            f"{', '.join(there)}."
        )
    in_the_way = [part for part in new.values() if part in there and part not in new]
    return dataset.remove_columns(in_the_way).rename_columns(new) if in_the_way else dataset.rename_columns(new)


def _reader(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    name: str,
) -> "Read":
    column = next((each for each in COLUMNS if each in dataset.column_names), None)
    if column is None:
        raise DataError(
            f"{name}: no column holds prompts; the columns are {', '.join(dataset.column_names)}. Name one `prompt`, "
            "with `columns` (as in columns={'prompt': 'task'}) or `dataset.rename_column`."
        )
    first = next((value for value in dataset[:100][column] if value), None)
    return Read(tokenizer, column, is_talk(first), max_prompt_length, dict(chat_template_kwargs or {}))


class _Whole:
    """The prompts of a stream, in which a row may lack a field and bad rows may be left out."""

    def __init__(self, read: "Read", skip: bool) -> None:
        self.read, self.skip = read, skip

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        batch = {self.read.column: [None] * len(indices), **batch}
        try:
            found = self.read(batch, indices)
        except DataError:
            if not self.skip:
                raise
            rows = [row for row in broken.each_alone(self.read, batch, indices) if not isinstance(row, DataError)]
            names = rows[0] if rows else {**batch, "prompt_ids": [], "prompt": [], "row": []}
            found = {column: [value for row in rows for value in row[column]] for column in names}
        return {column: values for column, values in found.items() if column not in COUNTERS}


class Read:
    """The function that `datasets.map` runs over batches of rows."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        column: str,
        talk: bool,
        max_prompt_length: int | None,
        template_kwargs: dict[str, Any],
    ) -> None:
        self.tokenizer, self.column, self.talk = tokenizer, column, talk
        self.max_prompt_length, self.template_kwargs = max_prompt_length, template_kwargs
        self.recipe = RECIPE  # a part of the fingerprint

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        prompts: list[Any] = []
        texts: list[str] = []
        for position, row in enumerate(indices):
            where, value = place(row, self.column), batch[self.column][position]
            if is_talk(value) is not self.talk:
                kinds = ("messages", "a string") if self.talk else ("a string", "messages")
                raise DataError(f"{where} is {kinds[1]} where row 0 has {kinds[0]}. Give one kind in every row.")
            if not self.talk:
                texts.append(text_of(value, where))
                prompts.append(value)
                continue
            messages = messages_of(value, where)
            if len(messages) > 1 and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            try:
                template, options = chat.chat_template(self.tokenizer), self._options(batch, position)
                texts.append(template.render(messages, add_generation_prompt=True, **options))
                template.check_complete(messages, texts[-1], **options)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            prompts.append(messages)
        ids = self.tokenizer(texts, add_special_tokens=not self.talk, return_attention_mask=False)["input_ids"]
        for position, row in enumerate(indices):
            if not ids[position]:
                raise DataError(f"{place(row, self.column)} is empty: there is nothing to answer. Remove the row.")
        doubled = [bos_doubled(self.tokenizer, text, each) for text, each in zip(texts, ids, strict=True)]
        ids = [each[1:] if twice else each for each, twice in zip(ids, doubled, strict=True)]
        limit = self.max_prompt_length
        found = {"prompt_ids": [each if limit is None else each[-limit:] for each in ids]}
        if self.column != "prompt" or self.talk:
            found["prompt"] = prompts
        lengths = [len(each) for each in ids]
        return {**batch, **found, "row": list(indices), "_length": lengths, "_bos_doubled": doubled}

    def _options(self, batch: Mapping[str, list[Any]], position: int) -> dict[str, Any]:
        options = dict(self.template_kwargs)
        own = (batch.get("chat_template_kwargs") or [None] * (position + 1))[position]
        options.update(without_none(own or {}))
        tools = (batch.get("tools") or [None] * (position + 1))[position]
        if tools:
            options["tools"] = json.loads(tools) if isinstance(tools, str) else without_none(tools)
        return options
