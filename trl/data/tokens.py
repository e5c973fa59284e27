"""Rows to token ids and loss masks: one pass over the data, one call of the tokenizer for a batch of rows.

Masks are made from positions, never from token ids: the end of a turn is trained even where it serves as padding.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from . import chat
from .formats import (
    DataError,
    Shape,
    answer_of,
    call_formatting,
    check_formatted,
    detect,
    dialogue_of,
    headed_text,
    is_talk,
    messages_of,
    place,
    text_of,
    with_system,
    without_none,
)
from .report import DataReport, Dropped, show
from .sources import from_rows
from .words import Words

logger = logging.getLogger(__name__)

RECIPE = 2  # raise it when the same options come to give other tokens, so that no stale cache is read
UNTRAINED_LABEL = -100  # what `labels` hold where no loss is taken, as everywhere in PyTorch

KEPT, TOO_SHORT, NOTHING_TRAINED, ALL_CUT = range(4)
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
# What travels beside the tokens until the report is written.
COUNTERS = ("_length", "_trainable", "_trained", "_dropped", "_end", "_bos_doubled", "_straddles")
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
        "row": datasets.Value("int64"),
        **{counter: datasets.Value("int32") for counter in COUNTERS},
    }
)


def prepare(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shape: Shape | None = None,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    add_eos: bool = True,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, DataReport]:
    """Turns rows of any known shape into token ids and loss masks.

    Returns a data set with the columns `input_ids` (list of int32, length L), `loss_mask` (list of bool, length L:
    whether the loss is taken on predicting this token; never true for the first) and `row` (index in `dataset`), and
    the report of what was done. Rows without a trained token, or with fewer than two tokens, are left out and counted.

    `shape` is detected with `text_field`, `columns` and `formatting_func` when it is not given. `max_length` is in
    tokens, special ones included; `truncation_mode` says which end stays, `keep_start` or `keep_end`.
    `completion_only_loss` None means True where there are completions. `add_eos` appends the tokenizer's EOS to plain
    text and plain completions that lack it; a conversation is what its chat template makes of it.

    Raises `DataError`, which names the row, the field and the remedy, for a row that cannot be read, for options that
    do not fit the data, and when no row at all is left.
    """
    options: dict[str, Any] = {
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "completion_only_loss": completion_only_loss,
        "assistant_only_loss": assistant_only_loss,
        "add_eos": add_eos,
    }
    shape, table = tabulate(
        dataset,
        tokenizer,
        shape=shape,
        text_field=text_field,
        columns=columns,
        formatting_func=formatting_func,
        num_proc=num_proc,
        name=name,
        **options,
    )
    return aggregate(table, tokenizer, shape, max_length, name)


def tabulate(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shape: Shape | None = None,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    num_proc: int | None = None,
    name: str = "train",
    first_row: int = 0,
    **options: Any,
) -> tuple[Shape, datasets.Dataset]:
    """The first half of `prepare`: every row as tokens, masks and counters, none left out yet. Rows are numbered from
    `first_row` on; further `options` are those of `prepare`."""
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set has no rows.")
    shape = detect(dataset, text_field, columns, formatting_func) if shape is None else shape
    shape = shape.with_template(bool(tokenizer.chat_template))
    check_options(shape, tokenizer, **options)
    tokenise = Tokenise(tokenizer, shape, formatting_func=formatting_func, first_row=first_row, **options)
    wanted = dataset.with_format(None)
    if not shape.formatting:  # which may read any column
        wanted = wanted.select_columns(list(dict.fromkeys(shape.columns.values())))
    return shape, wanted.map(
        tokenise,
        batched=True,
        with_indices=True,
        remove_columns=wanted.column_names,
        features=FEATURES,
        num_proc=num_proc,
        new_fingerprint=tokenise.fingerprint(wanted),
        desc=f"Tokenising {name}",
    )


def prepare_stream(
    stream: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shape: Shape | None = None,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    add_eos: bool = True,
    name: str = "train",
    look_at: int = 1000,
) -> tuple[datasets.IterableDataset, DataReport]:
    """`prepare` for a stream: rows are tokenised as they are asked for, in their order, in one pass.

    The shape and the report are those of the first `look_at` rows, and the report says so. Rows without a trained token
    are left out. `state_dict` and `load_state_dict` of the result continue it where it was, with the same rows to come;
    at most one batch of rows is then tokenised a second time.
    """
    options: dict[str, Any] = {
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "completion_only_loss": completion_only_loss,
        "assistant_only_loss": assistant_only_loss,
        "add_eos": add_eos,
    }
    head = from_rows(list(stream.take(look_at)))
    if len(head) == 0:
        raise DataError(f"{name}: the stream has no rows.")
    shape, table = tabulate(
        head,
        tokenizer,
        shape=shape,
        text_field=text_field,
        columns=columns,
        formatting_func=formatting_func,
        name=name,
        **options,
    )
    _, report = aggregate(table, tokenizer, shape, max_length, name)
    report.looked_at = len(head)
    tokenise = Tokenise(tokenizer, shape, formatting_func=formatting_func, **options)
    prepared = stream.map(
        _KeptOnly(tokenise, list(dict.fromkeys(shape.columns.values()))),
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=stream.column_names or head.column_names,
        features=datasets.Features({column: FEATURES[column] for column in ("input_ids", "loss_mask", "row")}),
    )
    return prepared, report


class _KeptOnly:
    """The rows of a stream that have something to train on, without the counters."""

    def __init__(self, tokenise: "Tokenise", columns: Sequence[str]):
        self.tokenise, self.columns = tokenise, columns

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        # A row that lacks a field, in a stream that does not know its columns, has it as None.
        batch = {**{column: [None] * len(indices) for column in self.columns}, **batch}
        table = self.tokenise(batch, indices)
        kept = [position for position, dropped in enumerate(table["_dropped"]) if dropped == KEPT]
        return {column: [table[column][position] for position in kept] for column in ("input_ids", "loss_mask", "row")}


def check_options(
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    add_eos: bool = True,
) -> None:
    """Raises `DataError` for options of `prepare` that do not fit the data."""
    if truncation_mode not in ("keep_start", "keep_end"):
        raise DataError(f"truncation_mode={truncation_mode!r} is not known: choose 'keep_start' or 'keep_end'.")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length={max_length} leaves nothing to predict: give at least 2, or None for no limit.")
    if completion_only_loss and shape.kind in ("text", "messages"):
        raise DataError(
            f"completion_only_loss=True, but the data have no completions ({shape.sentence}). Use prompt and "
            "completion columns, or assistant_only_loss=True for conversations."
        )
    if assistant_only_loss and shape.kind != "tokens" and not shape.conversational:
        raise DataError(
            f"assistant_only_loss=True, but the data are not conversations ({shape.sentence}). Set it to False, or "
            "give lists of messages."
        )
    if shape.conversational:
        chat.chat_template(tokenizer)  # so that a missing one is not blamed on a row


class _Text(NamedTuple):
    """A row as text, and which characters of it are trained (None: all)."""

    text: str
    spans: list[chat.Span] | None = None


class _Row(NamedTuple):
    """A row as tokens, before it is cut."""

    ids: list[int]
    mask: list[bool]
    bos_doubled: bool = False
    straddles: bool = False


class Tokenise:
    """The function that `datasets.map` runs over batches: it is pickled and hashed, so it holds plain values only."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        shape: Shape,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        completion_only_loss: bool | None = None,
        assistant_only_loss: bool = False,
        add_eos: bool = True,
        formatting_func: Callable[[Any], Any] | None = None,
        first_row: int = 0,
    ):
        self.tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self.formatting_func = formatting_func
        self.shape = shape
        self.max_length = max_length
        self.truncation_mode = truncation_mode
        self.completion_only_loss = completion_only_loss is not False
        self.assistant_only_loss = assistant_only_loss
        self.add_eos = add_eos
        self.first_row = first_row
        self.frame: tuple[list[int], list[int]] | None = None

    def fingerprint(self, dataset: datasets.Dataset) -> str:
        """Names the result in the cache of `datasets`, which by itself takes seconds to hash a large vocabulary."""
        tokenizer = self.tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        )
        options = {key: value for key, value in vars(self).items() if key not in ("tokenizer", "formatting_func")}
        options["formatting_func"] = datasets.fingerprint.Hasher.hash(self.formatting_func)
        special = (type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template)
        parts = (RECIPE, dataset._fingerprint, transformers.__version__, vocabulary, special, sorted(options.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        if self.shape.formatting:
            rows = self._format(batch, indices)
        elif self.shape.kind == "tokens":
            rows = [self._read_tokens(batch, position, row) for position, row in enumerate(indices)]
        elif self.shape.kind == "text":
            column = self.shape.columns["text"]
            values = zip(batch[column], indices, strict=True)
            rows = self._tokenise([_Text(text_of(value, place(row, column))) for value, row in values], plain=True)
        elif self.shape.kind == "messages":
            rows = self._tokenise(self._read_conversations(batch, indices), plain=False)
        elif self.shape.conversational:
            rows = self._tokenise(self._read_conversational_completions(batch, indices), plain=False)
        else:
            rows = self._tokenise(self._read_completions(batch, indices), plain=True)
        return self._columns(rows, indices)

    # -- rows to text -------------------------------------------------------------------------------------------------

    def _format(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[_Row]:
        """Rows by the user's own function."""
        assert self.formatting_func is not None
        column, talk = "formatting_func", self.shape.kind == "messages"
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
            if is_talk(value) is not talk:
                first, here = ("messages", "a string") if talk else ("a string", "something else")
                raise DataError(
                    f"row {row}: formatting_func returned {first} for row 0 and {here} for this one. Return one kind."
                )
        named = {**batch, column: values}
        if talk:
            return self._tokenise(self._read_conversations(named, indices, column), plain=False)
        return self._tokenise([_Text(text) for text in values], plain=True)

    def _read_conversations(
        self, batch: Mapping[str, list[Any]], indices: list[int], column: str | None = None
    ) -> list[_Text]:
        column = column or self.shape.columns["messages"]
        values = zip(batch[column], self._systems(batch, indices), indices, strict=True)
        conversations = [with_system(system, messages_of(value, place(row, column))) for value, system, row in values]
        if self.assistant_only_loss:
            spans = self._assistant_spans(conversations, batch, indices, column)
            return [_Text(text, trained) for text, trained in spans]
        return [_Text(text) for text in self._render(conversations, batch, indices, column)]

    def _systems(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[str | None]:
        column = self.shape.columns.get("system")
        return batch[column] if column else [None] * len(indices)

    def _read_completions(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[_Text]:
        texts = []
        for prompt, completion in self._pairs(batch, indices):
            whole = prompt + completion
            texts.append(_Text(whole, [(len(prompt), len(whole))] if self.completion_only_loss else None))
        return texts

    def _pairs(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[tuple[Any, Any]]:
        """Prompt and completion of each row: as they are, or, of a dialogue, as two texts or lists of messages."""
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

    def _read_conversational_completions(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[_Text]:
        prompts, completions = self.shape.columns["prompt"], self.shape.columns["completion"]
        wholes, tails = [], []
        for (prompt, completion), row in zip(self._pairs(batch, indices), indices, strict=True):
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            tail = messages_of(completion, place(row, completions))
            wholes.append(messages_of(prompt, place(row, prompts)) + tail)
            tails.append(tail)
        if not self.completion_only_loss and not self.assistant_only_loss:
            return [_Text(text) for text in self._render(wholes, batch, indices, completions)]
        texts = []
        spans = self._assistant_spans(wholes, batch, indices, completions)
        for (text, turns), whole, tail, row in zip(spans, wholes, tails, indices, strict=True):
            if not self.completion_only_loss:
                texts.append(_Text(text, turns))
                continue
            roles = [message["role"] for message in tail]
            if roles[0] != "assistant":
                raise DataError(
                    f"{place(row, completions)} begins with the role {roles[0]!r}. A completion begins with the "
                    "assistant's message: move the others to the prompt."
                )
            if len(turns) != sum(message["role"] == "assistant" for message in whole):
                raise DataError(
                    f"{place(row, completions)}: the chat template marks {len(turns)} generations, which is not the "
                    "number of assistant messages, so the completion cannot be told apart. Use "
                    "assistant_only_loss=True with completion_only_loss=False."
                )
            turns = turns[len(turns) - roles.count("assistant") :]
            # What stands between the turns of one completion (a tool's result) is part of the completion.
            texts.append(_Text(text, turns if self.assistant_only_loss else [(turns[0][0], turns[-1][1])]))
        return texts

    def _options(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[dict[str, Any]] | None:
        """The keyword arguments for the template of each row, or None if no row has any."""
        tools, further = self.shape.columns.get("tools"), self.shape.columns.get("chat_template_kwargs")
        if tools is None and further is None:
            return None
        options = []
        for position, row in enumerate(indices):
            option = dict(without_none(batch[further][position] or {})) if further else {}
            value = batch[tools][position] if tools else None
            if isinstance(value, str) and value.strip():
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise DataError(f"{place(row, tools or 'tools')} is not valid JSON ({error.msg}).") from error
            if value and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
                raise DataError(
                    f"{place(row, tools or 'tools')} is a {type(value).__name__}, not a list of tools. Give a list of "
                    "their JSON schemas, or that as JSON."
                )
            if value:
                option["tools"] = without_none(value)
            options.append(option)
        return options if any(options) else None

    def _render(
        self, conversations: list[list[dict[str, Any]]], batch: Mapping[str, list[Any]], indices: list[int], column: str
    ) -> list[str]:
        template = chat.chat_template(self.tokenizer)
        options = self._options(batch, indices)
        if options is None:
            try:
                return template.render_all(conversations)
            except DataError:
                options = [{}] * len(conversations)  # one by one, to find the row
        texts = []
        for messages, row, option in zip(conversations, indices, options, strict=True):
            try:
                texts.append(template.render(messages, **option))
            except DataError as error:
                raise DataError(f"{place(row, column)}: {error}") from error
        return texts

    def _assistant_spans(
        self, conversations: list[list[dict[str, Any]]], batch: Mapping[str, list[Any]], indices: list[int], column: str
    ) -> list[tuple[str, list[chat.Span]]]:
        template = chat.chat_template(self.tokenizer)
        options = self._options(batch, indices)
        results: list[tuple[str, list[chat.Span]] | DataError]
        if options is None:
            results = template.spans_all(conversations)
        else:
            pairs = zip(conversations, options, strict=True)
            results = [template.spans_or_error(messages, **option) for messages, option in pairs]
        found = []
        for result, row in zip(results, indices, strict=True):
            if isinstance(result, DataError):
                raise DataError(f"{place(row, column)}: {result}") from result
            found.append(result)
        return found

    # -- text to tokens -----------------------------------------------------------------------------------------------

    def _tokenise(self, texts: list[_Text], plain: bool) -> list[_Row]:
        """`plain` text gets the tokenizer's special tokens and an EOS; a rendered conversation has its own."""
        if not self.tokenizer.is_fast:
            return [self._tokenise_pieces(text, plain) for text in texts]
        words = Words.of(self.tokenizer)
        if words is None:
            return self._tokenise_batch(texts, plain)
        rows = [self._tokenise_words(words, text, plain) for text in texts]
        if not words.right:
            logger.warning(
                "Tokens by the word differ from the tokenizer's own, which are used from here on. Please report the "
                "name of this tokenizer; to be certain of the rows before, prepare the data again in this process."
            )
            return self._tokenise_batch(texts, plain)
        missing = [index for index, row in enumerate(rows) if row is None]
        for index, row in zip(missing, self._tokenise_batch([texts[index] for index in missing], plain), strict=True):
            rows[index] = row
        return rows  # type: ignore[return-value]

    def _tokenise_words(self, words: Words, text: _Text, plain: bool) -> _Row | None:
        straddles = False
        if text.spans is None:
            ids = words.encode(text.text)
            if ids is None:
                return None
            mask = [True] * len(ids)
        else:
            marked = words.encode_spans(text.text, text.spans)
            if marked is None:
                return None
            ids, mask, straddles = marked.ids, marked.mask, marked.straddles and plain
        if plain:
            before, after = self._frame()
            if before or after:
                ids = [*before, *ids, *after]
                mask = [False] * len(before) + mask + [text.spans is None] * len(after)
        return self._finish(text.text, ids, mask, plain, straddles)

    def _tokenise_batch(self, texts: list[_Text], plain: bool) -> list[_Row]:
        if not texts:
            return []
        masked = any(text.spans is not None for text in texts)
        encoded = self.tokenizer(
            [text.text for text in texts],
            add_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=masked,
            verbose=False,
        )
        trimmed = masked and chat.trims_offsets(self.tokenizer)
        rows = []
        for index, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
            straddles = False
            if text.spans is None:
                mask = [True] * len(ids)
            else:
                offsets = encoded["offset_mapping"][index]
                mask = chat.mask_tokens(offsets, text.spans, trimmed)
                if plain:
                    first = chat.first_token_at(offsets, text.spans[0][0], trimmed)
                    straddles = first > 0 and offsets[first - 1][1] > text.spans[0][0]
            rows.append(self._finish(text.text, ids, mask, plain, straddles))
        return rows

    def _tokenise_pieces(self, text: _Text, plain: bool) -> _Row:
        """Without offsets: every trained piece, and every piece between two, is tokenised on its own."""
        ids: list[int] = []
        mask: list[bool] = []
        whole = len(text.text)
        position = 0
        for start, end in [*([(0, whole)] if text.spans is None else text.spans), (whole, whole)]:
            for trained, piece in ((False, text.text[position:start]), (True, text.text[start:end])):
                new = self._encode(piece, special=False) if piece else []
                ids += new
                mask += [trained] * len(new)
            position = end
        if plain:
            before, after = self._frame()
            ids = [*before, *ids, *after]
            mask = [False] * len(before) + mask + [text.spans is None] * len(after)
        return self._finish(text.text, ids, mask, plain, False)

    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer sets around a text."""
        if self.frame is None:
            bare, framed = self._encode("a", special=False), self._encode("a", special=True)
            before = next(shift for shift in range(len(framed)) if framed[shift : shift + len(bare)] == bare)
            self.frame = framed[:before], framed[before + len(bare) :]
        return self.frame

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _finish(self, text: str, ids: list[int], mask: list[bool], plain: bool, straddles: bool) -> _Row:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        doubled = bos is not None and ids[:2] == [bos, bos] and text.startswith(str(self.tokenizer.bos_token))
        if doubled:
            ids, mask = ids[1:], mask[1:]
        if plain and self.add_eos and eos is not None:
            if ids and ids[-1] == eos:
                mask[-1] = True  # also where the tokenizer added it, at no place of the text
            else:
                ids, mask = [*ids, eos], [*mask, True]
        return _Row(ids, mask, doubled, straddles)

    # -- tokens given by the user -------------------------------------------------------------------------------------

    def _read_tokens(self, batch: Mapping[str, list[Any]], position: int, row: int) -> _Row:
        columns = self.shape.columns
        ids = batch[columns["input_ids"]][position]
        where = place(row, columns["input_ids"])
        if ids is None:
            raise DataError(f"{where} is None. Remove such rows with `dataset.filter`.")
        for index, token in enumerate(ids):
            if token is None or token < 0:
                raise DataError(f"{where}[{index}] is {token}, which is no token id. Correct or remove the row.")
            if token >= self.vocabulary:
                raise DataError(
                    f"{where}[{index}] is {token}, but the tokenizer has {self.vocabulary:,} tokens. Tokenise the data "
                    "with the tokenizer of this model."
                )
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
        return _Row(list(ids), mask)

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

    def _columns(self, rows: list[_Row], indices: list[int]) -> dict[str, list[Any]]:
        stops = self._stops()
        kept_ids: list[list[int]] = []
        kept_masks: list[list[bool]] = []
        counters: dict[str, list[int]] = {name: [] for name in COUNTERS}
        for row in rows:
            ids, mask = row.ids, row.mask
            length = len(ids)
            mask[:1] = [False] * min(1, length)  # nothing stands before the first token to predict it from
            trainable = trained = sum(mask)
            if self.max_length is not None and length > self.max_length:
                kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
                ids, mask = ids[kept], mask[kept]
                mask[0] = False
                trained = sum(mask)
            dropped = KEPT
            if not trained:
                dropped = TOO_SHORT if length < 2 else ALL_CUT if trainable else NOTHING_TRAINED
                ids, mask = [], []
            backwards = zip(reversed(ids), reversed(mask), strict=True)
            end = next((token for token, on in backwards if on and token in stops), -1)
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

    def _stops(self) -> set[int]:
        """The tokens that end a text or a turn."""
        stops = {self.tokenizer.eos_token_id} - {None}
        if self.tokenizer.chat_template:
            template = chat.chat_template(self.tokenizer)
            for name in template.special.findall(template.facts().end):
                stops.add(self.tokenizer.convert_tokens_to_ids(name))
        return stops


def aggregate(
    table: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    max_length: int | None,
    name: str,
    first_row: int = 0,
) -> tuple[datasets.Dataset, DataReport]:
    """The second half of `prepare`: takes the counters off the table and the dropped rows out of it, and writes the
    report, which numbers the rows as the user does."""
    count = {column: table.data.column(column).to_numpy() for column in COUNTERS}
    rows = table.data.column("row").to_numpy() - first_row
    kept = count["_dropped"] == KEPT
    dropped: list[Dropped] = []
    for reason, words in REASONS.items():
        which = rows[count["_dropped"] == reason]
        if len(which):
            dropped.append({"reason": words, "count": len(which), "rows": which[:5].tolist()})
    if not kept.any():
        first = int(count["_dropped"][0]) if len(rows) else TOO_SHORT
        columns = [column for part, column in shape.columns.items() if part in _MAIN_PARTS]
        field = ", ".join(f"`{column}`" for column in columns or ["formatting_func"])
        reasons = "; ".join(f"{entry['reason']} ({entry['count']})" for entry in dropped)
        raise DataError(
            f"{name}: none of the {len(rows)} rows can be trained on: {reasons}. The first is row 0, {field}: "
            f"{REASONS[first]}. {REMEDIES[first]}"
        )
    lengths, trainable, trained = count["_length"][kept], count["_trainable"][kept], count["_trained"][kept]
    lengths_after = lengths if max_length is None else np.minimum(lengths, max_length)
    ends = Counter(count["_end"][kept].tolist())
    ending = sum(ends.values()) - ends.pop(-1, 0)
    prepared = table.select_columns(["input_ids", "loss_mask", "row"])
    if not kept.all():
        prepared = prepared.select(np.flatnonzero(kept))
    sample = prepared[0]
    return prepared, DataReport(
        name=name,
        sentence=shape.sentence,
        rows_read=len(rows),
        rows_kept=int(kept.sum()),
        tokens=int(lengths_after.sum()),
        trained_tokens=int(trained.sum()),
        lengths={
            "min": int(lengths.min()),
            "median": round(float(np.median(lengths))),
            "p95": round(float(np.percentile(lengths, 95))),
            "max": int(lengths.max()),
        },
        max_length=max_length,
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


_MAIN_PARTS = ("input_ids", "text", "messages", "prompt", "input", "completion")
