"""Prompts that a model answers in training: token ids, and the columns that reward functions read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from . import chat
from .encode import RECIPE, bos_doubled
from .formats import DataError, is_talk, messages_of, place, text_of, without_none
from .report import show

# Where the prompt is: the first of these columns that the data have.
COLUMNS = ("prompt", "messages", "conversations", "question", "problem", "instruction", "query", "input", "text")


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
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, PromptReport]:
    """The data set with `prompt` (a string or a list of messages), `prompt_ids`, `row` and its other columns.

    Conversations go through the chat template, with `add_generation_prompt`, the row's `tools` and
    `chat_template_kwargs`; strings are tokenised as they are, and one that is written with a beginning of text gets no
    second. Of conversations that end with the assistant's turn, that turn is left out. A prompt longer than
    `max_prompt_length` tokens loses its beginning. Raises `DataError`, which names the row, the field and the remedy.
    """
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set has no rows.")
    column = next((each for each in COLUMNS if each in dataset.column_names), None)
    if column is None:
        raise DataError(
            f"{name}: no column holds prompts; the columns are {', '.join(dataset.column_names)}. Name one `prompt`, "
            "with `dataset.rename_column`."
        )
    talk = is_talk(dataset[0][column])
    read = Read(tokenizer, column, talk, max_prompt_length, dict(chat_template_kwargs or {}))
    prepared = dataset.with_format(None).map(
        read, batched=True, with_indices=True, num_proc=num_proc, desc=f"Tokenising {name}"
    )
    lengths, doubled = np.array(prepared["_length"]), sum(prepared["_bos_doubled"])
    prepared = prepared.remove_columns(["_length", "_bos_doubled"])
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
    )
    return prepared, report


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
                template = chat.chat_template(self.tokenizer)
                texts.append(template.render(messages, add_generation_prompt=True, **self._options(batch, position)))
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
