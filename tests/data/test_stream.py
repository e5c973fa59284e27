"""Streams: the same rows as from a table, lazily, and the same again from the place where a run was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pytest

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, user, word_tokenizer
from trl.data.batching.batches import RowBatches, StreamBatches
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.sequences import SequenceEncoder, prepare_sequences

ROWS: list[dict[str, Any]] = [
    {"messages": [user("hello " * (number % 5)), assistant(f"{number} day")], "id": number} for number in range(350)
]
for empty in (3, 120, 200):
    ROWS[empty] = {"messages": [user("what")], "id": empty}


def chatml() -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, tiny.CHATML, eos="<|im_end|>")


def stream_of(rows: list[dict[str, Any]]) -> datasets.IterableDataset:
    return load(rows).to_iterable_dataset(num_shards=3)


def test_the_rows_of_a_stream_are_those_of_a_table() -> None:
    stream, report = prepare_sequences(stream_of(ROWS), chatml(), assistant_only_loss=True, look_at=10)
    table, whole = prepare_sequences(load(ROWS), chatml(), assistant_only_loss=True)
    assert list(stream) == list(table)
    assert (report.rows_read, report.rows_kept, whole.rows_kept) == (10, 9, 347)
    assert report.lines()[0].startswith("train: 10 rows read, 9 kept; columns messages, id: read as conversations")
    assert report.lines()[1] == ("this is a stream, tokenised as it is read: this report covers only its first 10 rows")


def test_only_what_is_asked_for_is_read() -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(100_000):
            read.append(number)
            yield {"text": f"{number} sky"}

    stream, _ = prepare_sequences(datasets.IterableDataset.from_generator(rows), word_tokenizer(), look_at=20)
    assert len(read) <= 21
    first = next(iter(stream))
    assert first["row"] == 0 and len(read) < 250


def test_a_stream_without_column_names_and_with_gaps() -> None:
    rows = [{"prompt": "the sky", "completion": " is blue", "id": 0}, {"prompt": "hello", "completion": " bye"}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    prepared, _ = prepare_sequences(stream, word_tokenizer())
    assert list(prepared) == list(prepare_sequences(load(rows), word_tokenizer())[0])
    broken = datasets.IterableDataset.from_generator(lambda: iter([*rows, {"prompt": "hello"}]))
    prepared, _ = prepare_sequences(broken, word_tokenizer(), look_at=2)
    with pytest.raises(DataError, match="row 2: `completion` is None."):
        list(prepared)


def test_sentences() -> None:
    with pytest.raises(DataError, match="train: the stream has no rows."):
        prepare_sequences(datasets.IterableDataset.from_generator(lambda: iter([])), word_tokenizer())
    with pytest.raises(DataError, match="Cannot read the rows: the columns are `n`"):
        prepare_sequences(stream_of([{"n": 1}] * 3), word_tokenizer())


@pytest.mark.parametrize("stop", [0, 1, 99, 100, 130, 346])
def test_a_stream_goes_on_where_it_was(stop: int) -> None:
    stream, _ = prepare_sequences(stream_of(ROWS), chatml(), assistant_only_loss=True, look_at=5)
    rows = prepare_sequences(load(ROWS), chatml(), assistant_only_loss=True)[0][:]["row"]
    iterator = iter(stream)
    for _ in range(stop):
        next(iterator)
    state = stream.state_dict()
    again, _ = prepare_sequences(stream_of(ROWS), chatml(), assistant_only_loss=True, look_at=5)
    again.load_state_dict(state)
    assert [row["row"] for row in again] == rows[stop:]


def test_going_on_tokenises_at_most_one_batch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = prepare_sequences(stream_of(ROWS), chatml(), assistant_only_loss=True, look_at=5)
    iterator = iter(stream)
    for _ in range(320):
        next(iterator)
    state = stream.state_dict()
    seen: list[int] = []
    original = SequenceEncoder.__call__

    def counting(self: SequenceEncoder, batch: Any, indices: list[int]) -> Any:
        seen.extend(indices)
        return original(self, batch, indices)

    monkeypatch.setattr(SequenceEncoder, "__call__", counting)
    again, _ = prepare_sequences(stream_of(ROWS), chatml(), assistant_only_loss=True, look_at=5)
    seen.clear()
    again.load_state_dict(state)
    list(again)
    assert min(seen) >= 300


# -- batches of a stream --------------------------------------------------------------------------------------------


def numbers(batches: Any) -> list[list[int]]:
    return [[row["row"] for row in batch] for batch in batches]


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_those_of_a_table(drop_last: bool) -> None:
    rows = [{"text": f"{number} sky"} for number in range(23)]
    for rank in range(2):
        stream, _ = prepare_sequences(stream_of(rows), word_tokenizer())
        of_stream = StreamBatches(stream, 4, ranks=2, rank=rank, drop_last=drop_last)
        of_table = RowBatches(23, 4, shuffle=False, ranks=2, rank=rank, drop_last=drop_last)
        assert numbers(of_stream) == list(of_table)


@pytest.mark.parametrize("stop", [7, 27])
@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_go_on_where_they_were(shuffled: bool, stop: int) -> None:
    def made() -> StreamBatches:
        stream = stream_of([{"text": f"{number} sky"} for number in range(130)])
        return StreamBatches(
            prepare_sequences(stream.shuffle(seed=3, buffer_size=16) if shuffled else stream, word_tokenizer())[0], 4
        )

    def contents(batches: StreamBatches) -> list[list[int]]:
        # Rows are numbered as they come; what they hold says which they are.
        return [[int(decoder.decode(row["input_ids"][:-2])) for row in batch] for batch in batches]

    epochs = []
    decoder = word_tokenizer()
    batches = made()
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs.append(contents(batches))
    assert sorted(sum(epochs[1], [])) == list(range(130))
    assert (epochs[0] == epochs[1]) is not shuffled

    stopped = made()
    stopped.set_epoch(1)
    iterator = iter(stopped)
    for _ in range(stop):
        next(iterator)
    resumed = made()
    resumed.load_state_dict(stopped.state_dict())  # type: ignore[arg-type]
    resumed.set_epoch(1)
    assert contents(resumed) == epochs[1][stop:]
    resumed.set_epoch(2)
    assert contents(resumed) == epochs[2]
