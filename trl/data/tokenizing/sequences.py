"""Sequences: rows to token ids and loss masks, for SFT.

Masks come from positions, not from token ids: the end of a turn is trained even if its token is also used for padding.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape, call_formatting, check_formatted, detect
from trl.data.reading.messages import (
    answer_of,
    dialogue_of,
    headed_text,
    is_conversation,
    messages_of,
    place,
    pop_flags,
    text_of,
    with_system,
)
from trl.data.report import DataReport, show
from trl.data.tokenizing import recipe
from trl.data.tokenizing.encode import Encoder, Text, Tokens
from trl.data.tokenizing.recipe import TrainedRecipe

UNTRAINED_LABEL = -100  # the value of `labels` where no loss is taken, as everywhere in PyTorch

TOO_SHORT, NOTHING_TRAINED, ALL_CUT = range(1, 4)
REASONS = {
    TOO_SHORT: "fewer than 2 tokens",
    NOTHING_TRAINED: "no token to train on",
    ALL_CUT: "every token to train on lies beyond max_length",
}
REMEDIES = {
    TOO_SHORT: "A row needs a token and another one to predict from it: fill the field.",
    NOTHING_TRAINED: "Give it an assistant turn or a completion, or train on all tokens "
    "(assistant_only_loss=False, completion_only_loss=False).",
    ALL_CUT: "Raise `max_length`, or set truncation_mode to the other end of the row.",
}
COUNTERS = ("_length", "_trainable", "_trained", "_dropped", "_end", "_bos_doubled", "_straddles")
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
        "row": datasets.Value("int64"),
        **{counter: datasets.Value("int32") for counter in COUNTERS},
    }
)


def prepare_sequences(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    num_proc: int | None = None,
    look_at: int = 1000,
    **options: Any,
) -> tuple[Any, DataReport]:
    """Tokenises rows. `options` are the fields of `Sequences`; the other arguments are those of `recipe.prepare`.

    Returns a table or a stream, as `dataset` is, and the report. The columns are `input_ids` (L token ids, int32),
    `loss_mask` (L bools: whether the loss is taken on predicting this token; never true for the first) and `row`
    (index in `dataset`). Rows without a trained token, or with fewer than two tokens, are left out and counted. Raises
    `DataError` as `recipe.prepare` does.
    """
    sequences = Sequences(**options)
    return recipe.prepare(sequences, dataset, tokenizer, name=name, num_proc=num_proc, look_at=look_at)


@dataclass(frozen=True, kw_only=True)
class Sequences(TrainedRecipe):
    """Rows to sequences with a loss mask.

    Args:
        text_field: the column of text or of conversations; "text" by default.
        formatting_func: takes a row and returns a text or a list of messages, or takes a batch of rows and returns a
            list of texts. None by default.
        completion_only_loss: train on completions and not on prompts. None (the default): if there are completions.
        assistant_only_loss: train on the assistant's turns only. False by default.
    """

    text_field: str = "text"
    formatting_func: Callable[[Any], Any] | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False

    counters: ClassVar[tuple[str, ...]] = COUNTERS

    def detect(self, dataset: datasets.Dataset) -> Shape:
        return detect(dataset, self.text_field, self.columns, self.formatting_func)

    def check(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.completion_only_loss and shape.kind in ("text", "messages"):
            raise DataError(
                f"completion_only_loss=True, but the data have no completions ({shape.sentence}). Use prompt and "
                "completion columns, or assistant_only_loss=True for conversations."
            )
        if self.assistant_only_loss and shape.kind != "tokens" and not shape.conversational:
            raise DataError(
                f"assistant_only_loss=True, but the data are not conversations ({shape.sentence}). Set it to False, or "
                "give lists of messages."
            )
        super().check(shape, tokenizer)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, first_row: int = 0) -> "SequenceEncoder":
        return SequenceEncoder(tokenizer, shape, self, first_row)

    def aggregate(
        self,
        table: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        shape: Shape,
        name: str,
        first_row: int = 0,
    ) -> tuple[datasets.Dataset, DataReport]:
        count = self.count(table)
        parts = ("input_ids", "text", "messages", "prompt", "input", "completion")
        prepared, dropped = recipe.drop_rows(self, table, shape, name, first_row, REASONS, REMEDIES, parts)
        kept = count["_dropped"] == KEPT
        lengths, trainable, trained = count["_length"][kept], count["_trainable"][kept], count["_trained"][kept]
        lengths_after = lengths if self.max_length is None else np.minimum(lengths, self.max_length)
        ends = Counter(count["_end"][kept].tolist())
        ending = sum(ends.values()) - ends.pop(-1, 0)
        sample = prepared[0]
        return prepared, DataReport(
            name=name,
            sentence=shape.sentence,
            rows_read=len(table),
            rows_kept=int(kept.sum()),
            tokens=int(lengths_after.sum()),
            trained_tokens=int(trained.sum()),
            lengths=recipe.length_summary(lengths),
            max_length=self.max_length,
            rows_cut=int((lengths > lengths_after).sum()),
            tokens_cut=int((lengths - lengths_after).sum()),
            trained_tokens_cut=int((trainable - trained).sum()),
            dropped=dropped,
            end_of_turn=ending,
            end_of_turn_token=str(tokenizer.convert_ids_to_tokens(ends.most_common(1)[0][0])) if ending else None,
            bos_doubled=int(count["_bos_doubled"].sum()),
            boundary_tokens=int(count["_straddles"][kept].sum()),
            sample=show(tokenizer, sample["input_ids"], sample["loss_mask"]),
            sample_row=int(sample["row"]) - first_row,
        )


class SequenceEncoder(Encoder):
    """Batches of rows to sequences and loss masks."""

    features = FEATURES
    recipe: Sequences

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, recipe: Sequences, first_row: int = 0):
        super().__init__(tokenizer, shape, recipe, first_row)
        self.formatting_func = recipe.formatting_func
        self.completion_only_loss = recipe.completion_only_loss is not False
        self.assistant_only_loss = recipe.assistant_only_loss

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        if self.shape.formatting:
            rows = self._format(batch, indices)
        elif self.shape.kind == "tokens":
            rows = [self._read_tokens(batch, position, row) for position, row in enumerate(indices)]
        elif self.shape.kind == "text":
            column = self.shape.columns["text"]
            values = zip(batch[column], indices, strict=True)
            rows = self._tokenise([Text(text_of(value, place(row, column))) for value, row in values], plain=True)
        elif self.shape.kind == "messages":
            rows = self._tokenise(self._read_conversations(batch, indices), plain=False)
        elif self.shape.conversational:
            rows = self._tokenise(self._read_conversational_completions(batch, indices), plain=False)
        else:
            texts = self._read_completions(batch, indices)
            rows = [self._separated(*each) for each in zip(texts, self._tokenise(texts, plain=True), strict=True)]
        return self._columns(rows, indices)

    def _separated(self, text: Text, row: Tokens) -> Tokens:
        """The tokens of a prompt and its completion.

        If one token covers the end of the prompt and all of the completion, nothing would be trained: the two are then
        tokenised separately.
        """
        if not row.straddles:
            return row
        trained = sum(row.mask) - int(self.recipe.add_eos and row.mask[-1])
        return row if trained else self._tokenise_pieces(text, plain=True)

    # -- rows to text -------------------------------------------------------------------------------------------------

    def _format(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[Tokens]:
        """The tokens of rows that the user's `formatting_func` turns into texts or messages."""
        assert self.formatting_func is not None
        column, conversational = "formatting_func", self.shape.kind == "messages"
        if self.shape.formatting == "batch":
            values = call_formatting(self.formatting_func, dict(batch), indices[0])
            if not isinstance(values, list | tuple) or len(values) != len(indices):
                count = f"{len(values)} texts" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
                raise DataError(
                    f"row {indices[0]}: formatting_func returned {count} for {len(indices)} rows. It must return a "
                    "list with one string for each row."
                )
        else:
            keys = list(batch)
            rows = zip(*(batch[key] for key in keys), strict=True)
            values = [
                check_formatted(call_formatting(self.formatting_func, dict(zip(keys, row, strict=True)), index), index)
                for row, index in zip(rows, indices, strict=True)
            ]
        for value, row in zip(values, indices, strict=True):
            if is_conversation(value) is not conversational:
                first, here = ("messages", "a string") if conversational else ("a string", "something else")
                raise DataError(
                    f"row {row}: formatting_func returned {first} for row 0 and {here} for this one. Return one kind."
                )
        named = {**batch, column: values}
        if conversational:
            return self._tokenise(self._read_conversations(named, indices, column), plain=False)
        return self._tokenise([Text(text) for text in values], plain=True)

    def _read_conversations(
        self, batch: Mapping[str, list[Any]], indices: list[int], column: str | None = None
    ) -> list[Text]:
        column = column or self.shape.columns["messages"]
        wheres = [place(row, column) for row in indices]
        messages = [messages_of(value, where) for value, where in zip(batch[column], wheres, strict=True)]
        flags = [pop_flags(each, where) for each, where in zip(messages, wheres, strict=True)]
        systems = self._systems(batch, indices)
        conversations = [with_system(system, each) for system, each in zip(systems, messages, strict=True)]
        options = self._template_options(batch, indices)
        if not any(flags) and not self.assistant_only_loss:
            return [Text(text) for text in self._render(conversations, options, indices, column)]
        marked = [position for position, flag in enumerate(flags) if flag is not None or self.assistant_only_loss]
        texts: dict[int, Text] = {}
        rest = [position for position in range(len(indices)) if position not in set(marked)]
        for positions, masked in ((marked, True), (rest, False)):
            some = [conversations[position] for position in positions]
            own = [options[position] for position in positions] if options is not None else None
            rows = [indices[position] for position in positions]
            if not masked:
                found = [Text(text) for text in self._render(some, own, rows, column)]
            else:
                found = [Text(text, spans) for text, spans in self._assistant_spans(some, own, rows, column)]
            texts.update(zip(positions, found, strict=True))
        return [
            text if flag is None else self._flagged(text, flag, messages[position], wheres[position])
            for position, flag in enumerate(flags)
            for text in [texts[position]]
        ]

    @staticmethod
    def _flagged(text: Text, flags: Sequence[bool], messages: Sequence[Mapping[str, Any]], where: str) -> Text:
        """The text with the assistant's turns trained whose entry in `flags` (one for each message) is true."""
        spans = text.spans or []
        turns = [on for on, message in zip(flags, messages, strict=True) if message["role"] == "assistant"]
        if len(turns) != len(spans):
            raise DataError(
                f"{where}: the chat template marks {len(spans)} generations, but there are {len(turns)} assistant "
                "messages, so that the marked ones cannot be told apart. Remove the marks, or the template's own."
            )
        return Text(text.text, [span for span, on in zip(spans, turns, strict=True) if on])

    def _systems(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[str | None]:
        column = self.shape.columns.get("system")
        return batch[column] if column else [None] * len(indices)

    def _read_completions(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[Text]:
        texts = []
        for prompt, completion in self._pairs(batch, indices):
            full_text = prompt + completion
            texts.append(Text(full_text, [(len(prompt), len(full_text))] if self.completion_only_loss else None))
        return texts

    def _pairs(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[tuple[Any, Any]]:
        """The prompt and the completion of each row, both texts or both lists of messages."""
        prompts, completions = self.shape.columns["prompt"], self.shape.columns["completion"]
        pairs: list[tuple[Any, Any]] = []
        if self.shape.kind != "dialogue":
            for prompt, completion, row in zip(batch[prompts], batch[completions], indices, strict=True):
                if not self.shape.conversational:
                    text_of(prompt, place(row, prompts))
                    text_of(completion, place(row, completions))
                pairs.append((prompt, completion))
            return pairs
        further = self.shape.columns.get("input")
        systems = self._systems(batch, indices)
        begin = dialogue_of if self.shape.conversational else headed_text
        for position, row in enumerate(indices):
            asked = text_of(batch[prompts][position], place(row, prompts))
            answer = answer_of(batch[completions][position], place(row, completions))
            pairs.append((begin(asked, batch[further][position] if further else None, systems[position]), answer))
        return pairs

    def _read_conversational_completions(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[Text]:
        prompts, completions = self.shape.columns["prompt"], self.shape.columns["completion"]
        conversations, tails = [], []
        marks: list[list[list[bool] | None]] = []  # the flags of the messages of each prompt and completion
        for (prompt, completion), row in zip(self._pairs(batch, indices), indices, strict=True):
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            head, tail = messages_of(prompt, place(row, prompts)), messages_of(completion, place(row, completions))
            marks.append([pop_flags(head, place(row, prompts)), pop_flags(tail, place(row, completions))])
            conversations.append(head + tail)
            tails.append(tail)
        options = self._template_options(batch, indices)
        marked = any(flags and not all(flags) for _, flags in marks)
        if not self.completion_only_loss and not self.assistant_only_loss and not marked:
            return [Text(text) for text in self._render(conversations, options, indices, completions)]
        texts = []
        spans = self._assistant_spans(conversations, options, indices, completions)
        for (text, turns), conversation, tail, (_, flags), row in zip(
            spans, conversations, tails, marks, indices, strict=True
        ):
            if flags is not None and not all(flags):
                own = turns[len(turns) - sum(message["role"] == "assistant" for message in tail) :]
                texts.append(self._flagged(Text(text, own), flags, tail, place(row, completions)))
                continue
            if not self.completion_only_loss:
                texts.append(Text(text, turns))
                continue
            roles = [message["role"] for message in tail]
            if roles[0] != "assistant":
                raise DataError(
                    f"{place(row, completions)} begins with the role {roles[0]!r}. A completion begins with the "
                    "assistant's message: move the others to the prompt."
                )
            if len(turns) != sum(message["role"] == "assistant" for message in conversation):
                raise DataError(
                    f"{place(row, completions)}: the chat template marks {len(turns)} generations, which is not the "
                    "number of assistant messages, so the completion cannot be told apart. Use "
                    "assistant_only_loss=True with completion_only_loss=False."
                )
            turns = turns[len(turns) - roles.count("assistant") :]
            # The messages between the turns of a completion (results of tools) belong to the completion.
            texts.append(Text(text, turns if self.assistant_only_loss else [(turns[0][0], turns[-1][1])]))
        return texts

    # -- tokens given by the user -------------------------------------------------------------------------------------

    def _read_tokens(self, batch: Mapping[str, list[Any]], position: int, row: int) -> Tokens:
        columns = self.shape.columns
        ids = self._check_ids(batch[columns["input_ids"]][position], place(row, columns["input_ids"]))
        mask = [True] * len(ids)
        for part in ("labels", "completion_mask", "assistant_masks", "loss_mask"):
            if part not in columns or (part == "completion_mask" and not self.completion_only_loss):
                continue
            values = batch[columns[part]][position]
            if values is None or len(values) != len(ids):
                length = "None" if values is None else f"of length {len(values)}"
                raise DataError(
                    f"{place(row, columns[part])} is {length}, but `input_ids` has {len(ids)} tokens. Give one entry "
                    "for each token."
                )
            if part == "labels":
                self._check_labels(values, ids, place(row, columns[part]))
                values = [value != UNTRAINED_LABEL for value in values]
            mask = [old and bool(value) for old, value in zip(mask, values, strict=True)]
        return Tokens(ids, mask)

    @staticmethod
    def _check_labels(labels: Sequence[int], ids: Sequence[int], where: str) -> None:
        for index, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if isinstance(label, bool):
                raise DataError(f"{where}[{index}] is {label}: labels are token ids. A mask belongs in `loss_mask`.")
            if label not in (UNTRAINED_LABEL, token):
                raise DataError(
                    f"{where}[{index}] is {label}, but the token there is {token}. Labels are the `input_ids` "
                    f"themselves, not shifted, with {UNTRAINED_LABEL} where no loss is taken."
                )

    # -- cutting and counting -----------------------------------------------------------------------------------------

    def _columns(self, rows: list[Tokens], indices: list[int]) -> dict[str, list[Any]]:
        stops = self._stops()
        kept_ids: list[list[int]] = []
        kept_masks: list[list[bool]] = []
        counters: dict[str, list[int]] = {name: [] for name in COUNTERS}
        for row in rows:
            ids, mask = row.ids, row.mask
            length = len(ids)
            mask[:1] = [False] * min(1, length)  # no token stands before the first one to predict it from
            trainable = trained = sum(mask)
            # The model learns to stop from the last end of turn, which the cut may remove.
            last = next((at for at in reversed(range(length)) if mask[at] and ids[at] in stops), None)
            end = -1 if last is None else ids[last]
            if self.recipe.max_length is not None and length > self.recipe.max_length:
                kept = (
                    slice(self.recipe.max_length)
                    if self.recipe.truncation_mode == "keep_start"
                    else slice(-self.recipe.max_length, None)
                )
                first = range(length)[kept].start
                if last is not None and not first < last < first + self.recipe.max_length:
                    end = -1
                ids, mask = ids[kept], mask[kept]
                mask[0] = False
                trained = sum(mask)
            dropped = KEPT
            if not trained:
                dropped = TOO_SHORT if length < 2 else ALL_CUT if trainable else NOTHING_TRAINED
                ids, mask = [], []
            kept_ids.append(ids)
            kept_masks.append(mask)
            values = (length, trainable, trained, dropped, end, int(row.bos_doubled), int(row.straddles))
            for name, value in zip(COUNTERS, values, strict=True):
                counters[name].append(value)
        return {
            "input_ids": kept_ids,
            "loss_mask": kept_masks,
            "row": [self.first_row + row for row in indices],
            **counters,
        }
