"""Data sets and their order, for loops of one's own: a sampler, cutting, packing, older functions that make texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler

# --- the order of rows ----------------------------------------------------------------------------------------------


class RepeatSampler(Sampler[int]):
    """Indices of rows in batches of `batch_size`: each index `mini_repeat_count` times in turn, each batch
    `repeat_count` times in turn. Rows that do not fill a batch are left out.

    With `shuffle` the order is random: by `seed`, and different in each pass; or by torch's generator if it is None.
    """

    def __init__(
        self,
        data_source: Sized,
        mini_repeat_count: int,
        batch_size: int = 1,
        repeat_count: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        self.data_source, self.num_samples = data_source, len(data_source)
        self.mini_repeat_count, self.batch_size, self.repeat_count = mini_repeat_count, batch_size, repeat_count
        self.shuffle, self.seed = shuffle, seed
        self.generator = torch.Generator().manual_seed(
            int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        )

    def __iter__(self) -> Iterator[int]:
        rows = range(self.num_samples)
        order = torch.randperm(self.num_samples, generator=self.generator).tolist() if self.shuffle else list(rows)
        for start in range(0, self.num_samples - self.batch_size + 1, self.batch_size):
            batch = order[start : start + self.batch_size]
            for _ in range(self.repeat_count):
                for row in batch:
                    yield from [row] * self.mini_repeat_count

    def __len__(self) -> int:
        batches = self.num_samples // self.batch_size
        return batches * self.batch_size * self.mini_repeat_count * self.repeat_count


# --- data sets of tokens --------------------------------------------------------------------------------------------


def get_dataset_column_names(dataset: Any) -> list[str]:
    """The names of the columns; those of a stream are read from its first row if it does not know them."""
    return list(dataset.column_names or next(iter(dataset)).keys())


def truncate_dataset(dataset: Any, max_length: int, map_kwargs: Mapping[str, Any] | None = None) -> Any:
    """The data set with every list cut to its first `max_length` entries; other columns stay.

    `dataset` is a data set, a stream or a dictionary of them. `map_kwargs` go to its `map`.
    """
    return dataset.map(_Truncate(max_length), **dict(map_kwargs or {}))


class _Truncate:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value[: self.length] if isinstance(value, list) else value for name, value in row.items()}


def pack_examples(examples: Mapping[str, list[list[Any]]], seq_length: int) -> dict[str, list[list[Any]]]:
    """The rows of each column, joined and cut into pieces of `seq_length`; the last piece may be shorter."""
    joined = {name: [value for row in rows for value in row] for name, rows in examples.items()}
    return {
        name: [values[start : start + seq_length] for start in range(0, len(values), seq_length)]
        for name, values in joined.items()
    }


class ConstantLengthDataset(IterableDataset[dict[str, Tensor]]):
    """A stream of `input_ids` and `labels` of exactly `seq_length` tokens: the rows of a data set, one after the other,
    an end token behind each (`append_concat_token`). What does not fill the last piece is left out.

    `formatting_func` or `dataset_text_field` makes the text of a row. Rows are read until they have about
    `seq_length * chars_per_token * num_of_sequences` characters; their pieces are shuffled by `random` (`shuffle`).
    `infinite` begins anew at the end.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
    ) -> None:
        if formatting_func is None and dataset_text_field is None:
            raise ValueError("give dataset_text_field, the column of the texts, or formatting_func, which makes them")
        self.tokenizer, self.dataset = tokenizer, dataset
        own = getattr(tokenizer, "eos_token_id", None)
        self.concat_token_id = eos_token_id if own is None else own
        self.formatting_func = formatting_func or (lambda row: row[dataset_text_field])
        self.infinite, self.seq_length, self.shuffle = infinite, seq_length, shuffle
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.append_concat_token, self.add_special_tokens = append_concat_token, add_special_tokens

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        import random

        left: list[int] = []
        for texts in self._buffers():
            for ids in self.tokenizer(texts, add_special_tokens=self.add_special_tokens, truncation=False)["input_ids"]:
                left += ids + [self.concat_token_id] * self.append_concat_token
            whole = len(left) // self.seq_length * self.seq_length
            pieces = [left[start : start + self.seq_length] for start in range(0, whole, self.seq_length)]
            left = left[whole:]
            if self.shuffle:
                random.shuffle(pieces)
            for piece in pieces:
                yield {"input_ids": torch.tensor(piece), "labels": torch.tensor(piece)}

    def _buffers(self) -> Iterator[list[str]]:
        texts: list[str] = []
        size = 0
        while True:
            empty = True
            for row in self.dataset:
                text = self.formatting_func(row)
                texts.append(text)
                size += len(text)
                empty = False
                if size >= self.max_buffer_size:
                    yield texts
                    texts, size = [], 0
            if not self.infinite or empty:
                break
        if texts:
            yield texts


# --- texts of rows --------------------------------------------------------------------------------------------------

_MESSAGE = {"content": datasets.Value("string"), "role": datasets.Value("string")}
FORMAT_MAPPING = {
    "chatml": [_MESSAGE],
    "instruction": {"completion": datasets.Value("string"), "prompt": datasets.Value("string")},
}


def conversations_formatting_function(
    tokenizer: Any, messages_field: str, tools: Any = None
) -> Callable[[Mapping[str, Any]], Any]:
    """A function that renders the column `messages_field` of a row, or of a batch of rows, with the chat template."""
    more = {} if tools is None else {"tools": tools}

    def texts(examples: Mapping[str, Any]) -> Any:
        found = examples[messages_field]
        if found and isinstance(found[0], list):
            return [tokenizer.apply_chat_template(each, tokenize=False, **more) for each in found]
        return tokenizer.apply_chat_template(found, tokenize=False, **more)

    return texts


def instructions_formatting_function(tokenizer: Any) -> Callable[[Mapping[str, Any]], Any]:
    """A function that renders `prompt` and `completion` of a row, or of a batch of rows, as one user and one assistant
    turn."""

    def text(prompt: str, completion: str) -> Any:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    def texts(examples: Mapping[str, Any]) -> Any:
        if isinstance(examples["prompt"], list):
            return [text(*pair) for pair in zip(examples["prompt"], examples["completion"], strict=True)]
        return text(examples["prompt"], examples["completion"])

    return texts


def get_formatting_func_from_dataset(
    dataset: Any, tokenizer: Any, tools: Any = None
) -> Callable[[Mapping[str, Any]], Any] | None:
    """The function that makes texts of the rows: for columns `messages` or `conversations` of messages, or for `prompt`
    and `completion`; None for other columns."""
    features = getattr(dataset, "features", None) or {}
    for column in ("messages", "conversations"):
        kind = features.get(column)
        inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
        if isinstance(inner, Mapping) and {"role", "content"} <= inner.keys():
            return conversations_formatting_function(tokenizer, column, tools)
    if set(features) == {"prompt", "completion"}:
        return instructions_formatting_function(tokenizer)
    return None


def decode_and_strip_padding(inputs: Tensor, tokenizer: Any) -> list[str]:
    """The texts of rows of ids [B, T], without the tokenizer's padding token."""
    return [text.replace(tokenizer.pad_token, "") for text in tokenizer.batch_decode(inputs)]


# --- special tokens of tokenised pairs ------------------------------------------------------------------------------

Tokens = dict[str, list[int]]


def add_bos_token_if_needed(
    bos_token_id: int | None,
    prompt_len_input_ids: int,
    prompt_tokens: Tokens,
    chosen_prompt_len_input_ids: int,
    chosen_tokens: Tokens,
    rejected_prompt_len_input_ids: int,
    rejected_tokens: Tokens,
) -> tuple[Tokens, Tokens, Tokens]:
    """Put the token before `prompt_input_ids` of each mapping that does not begin with it, and 1 before its mask."""
    lengths = (prompt_len_input_ids, chosen_prompt_len_input_ids, rejected_prompt_len_input_ids)
    for length, tokens in zip(lengths, (prompt_tokens, chosen_tokens, rejected_tokens), strict=True):
        if bos_token_id is not None and (length == 0 or tokens["prompt_input_ids"][0] != bos_token_id):
            tokens["prompt_input_ids"] = [bos_token_id, *tokens["prompt_input_ids"]]
            tokens["prompt_attention_mask"] = [1, *tokens["prompt_attention_mask"]]
    return prompt_tokens, chosen_tokens, rejected_tokens


def add_eos_token_if_needed(eos_token_id: int, chosen_tokens: Tokens, rejected_tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Put the token behind `input_ids` of each mapping that does not end with it, and 1 behind its mask."""
    for tokens in (chosen_tokens, rejected_tokens):
        if tokens["input_ids"][-1:] != [eos_token_id]:
            tokens["input_ids"] = [*tokens["input_ids"], eos_token_id]
            tokens["attention_mask"] = [*tokens["attention_mask"], 1]
    return chosen_tokens, rejected_tokens


def repeat_iterable_dataset(dataset: Any, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1) -> Any:
    """A stream in the order in which `RepeatSampler` gives rows without `shuffle`."""
    return dataset.map(
        _Repeat(mini_repeat_count, batch_size, repeat_count), batched=True, batch_size=batch_size, drop_last_batch=True
    )


class _Repeat:
    def __init__(self, rows: int, batch_size: int, batches: int) -> None:
        self.order = [row for _ in range(batches) for row in range(batch_size) for _ in range(rows)]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        return {name: [values[row] for row in self.order] for name, values in batch.items()}
