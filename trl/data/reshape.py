"""Rows of one shape written as rows of another: whatever the readings understand, as messages, prompts with
completions, pairs or labelled completions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from trl.data.reading import broken, samples
from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape, detect
from trl.data.reading.messages import answer_of, dialogue_of, messages_of, place, pop_flags, text_of, with_system
from trl.data.reading.readings import (
    PAIR_READINGS,
    READINGS,
    UNDERSTOOD,
    UNDERSTOOD_PAIRS,
    UNDERSTOOD_UNPAIRED,
    UNPAIRED_READINGS,
)
from trl.data.reading.samples import Sample
from trl.data.reading.sources import as_shown

TARGETS = ("messages", "prompt-completion", "prompt", "preference", "unpaired")
KEPT_PARTS = ("tools", "chat_template_kwargs", "margin")  # parts of a row that keep their name and value


@dataclass
class Converted:
    """Rows of the new shape, and what became of the old ones.

    Args:
        rows: the new rows.
        sentence: how the old rows were read.
        rows_read: number of the old rows.
        unreadable: numbers of the rows left out because they could not be read.
        unused: numbers of the rows that make none of the new shape: answers labelled bad where good ones are wanted,
            identical pairs, labelled answers whose prompt has none of the other label.
    """

    rows: list[dict[str, Any]]
    sentence: str
    rows_read: int
    unreadable: list[int] = field(default_factory=list)
    unused: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What was done, as plain lines."""
        lines = [f"{self.rows_read:,} rows read; {self.sentence}", f"{len(self.rows):,} rows written"]
        for numbers, what in ((self.unreadable, "cannot be read"), (self.unused, "make no row of this shape")):
            if numbers:
                more = ", …" if len(numbers) > 5 else ""
                lines.append(f"{len(numbers):,} left out, which {what}: {', '.join(map(str, numbers[:5]))}{more}")
        return lines


def convert(
    dataset: datasets.Dataset,
    to: str,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    skip_bad_rows: bool = False,
) -> Converted:
    """Writes rows in another shape.

    Args:
        dataset: a table in any shape that a trainer reads.
        to: "messages"; "prompt-completion", the last assistant turn being the completion; "prompt"; "preference"
            (pairs, or labelled answers of which a good and a bad one have the same prompt); or "unpaired" (labelled
            answers). Of pairs and labelled answers the first three take the good ones.
        columns: which column holds which part, as in the trainers' option. None (the default) goes by their names.
        keep: further columns to copy; none by default.
        skip_bad_rows: leave out the rows that cannot be read. False (the default) raises `DataError`, which names them.

    Texts stay texts where `to` allows it: a prompt and a completion that are strings make messages only for "messages".
    Raises `DataError` for another `to`, and for rows that are not understood.
    """
    if to not in TARGETS:
        raise DataError(f"to={to!r} is not a shape of rows: choose one of {', '.join(map(repr, TARGETS))}.")
    if missing := [column for column in keep if column not in dataset.column_names]:
        raise DataError(f"There is no column {missing[0]!r} to keep; columns are {', '.join(dataset.column_names)}.")
    shown = as_shown(dataset)
    shape = _shape(shown, to, columns).with_template(True)
    if shape.kind in ("text", "tokens"):
        raise DataError(f"{shape.sentence}: only rows with a question and an answer can be written in another shape.")
    found = Converted([], shape.sentence, len(dataset))
    faults: dict[int, str] = {}
    read: list[tuple[int, Sample, dict[str, Any]]] = []
    for row, values in enumerate(_values(shown, shape)):
        try:
            sample = _read(shape, {part: values[column] for part, column in shape.columns.items()}, row)
        except DataError as error:
            faults[row] = str(error)
            continue
        further = {part: values[shape.columns[part]] for part in KEPT_PARTS if part in shape.columns}
        read.append((row, sample, further))
    if faults and (not skip_bad_rows or not read):
        raise DataError(broken.sentence(faults, dataset))
    found.unreadable = list(faults)
    others = shown.select_columns(list(keep)).with_format(None) if keep else None
    made = _paired(read) if to == "preference" and "label" in shape.columns else _alone(read, to)
    for row, new in made:
        if new is None:
            found.unused.append(row)
        else:
            found.rows.append({**new, **(others[row] if others is not None else {})})
    if not found.rows:
        raise DataError(f"None of the {len(dataset):,} rows makes a row of {to}; {shape.sentence}.")
    found.unused.sort()
    return found


def _shape(shown: datasets.Dataset, to: str, columns: Mapping[str, str] | None) -> Shape:
    """How the rows are read: as judged ones if they can be, so that a bad answer is never taken for a good one."""
    judged = [(PAIR_READINGS, UNDERSTOOD_PAIRS), (UNPAIRED_READINGS, UNDERSTOOD_UNPAIRED)]
    plain = [(READINGS, UNDERSTOOD)] if to in ("messages", "prompt-completion", "prompt") else []
    for readings, understood in (*judged, *plain)[:-1]:
        try:
            return detect(shown, columns=columns, readings=readings, understood=understood)
        except DataError:
            continue
    readings, understood = (*judged, *plain)[-1]
    return detect(shown, columns=columns, readings=readings, understood=understood)


def _values(shown: datasets.Dataset, shape: Shape) -> Iterator[dict[str, Any]]:
    """The columns of the shape, a row at a time, with numbers as text where the shape reads them so."""
    as_text = broken.NumbersAsText(lambda batch, indices: dict(batch), shape.numbers)
    columns = list(dict.fromkeys(shape.columns.values()))
    for row, values in enumerate(shown.select_columns(columns).with_format(None)):
        batch = as_text({column: [value] for column, value in values.items()}, [row])
        yield {column: each[0] for column, each in batch.items()}


def _read(shape: Shape, values: Mapping[str, Any], row: int) -> Sample:
    """The prompt and the answers of a row. A conversation without an answer has no completions."""
    if {"chosen", "label", "responses"} & set(shape.columns):
        return samples.read(shape, values, row)
    wheres = {part: place(row, column) for part, column in shape.columns.items()}
    if shape.kind == "messages":
        messages = with_system(values.get("system"), messages_of(values["messages"], wheres["messages"]))
        if messages[-1]["role"] != "assistant":
            return Sample(messages, (), ())
        return Sample(messages[:-1], (messages[-1:],), (True,))
    if shape.kind == "dialogue":
        asked = text_of(values["prompt"], wheres["prompt"])
        answer = answer_of(values["completion"], wheres["completion"])
        prompt = dialogue_of(asked, values.get("input"), values.get("system"))
        return Sample(prompt, ([{"role": "assistant", "content": answer}],), (True,))
    sides: list[Any] = []
    for part, role in (("prompt", "user"), ("completion", "assistant")):
        value = values[part]
        if not shape.conversational:
            sides.append(text_of(value, wheres[part]))
        else:
            turns = [{"role": role, "content": value}] if isinstance(value, str) else value
            sides.append(messages_of(turns, wheres[part]))
    return Sample(sides[0], (sides[1],), (True,))


def _alone(read: Sequence[tuple[int, Sample, dict[str, Any]]], to: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The new rows that each old one makes by itself; None for one that makes none."""
    for row, sample, further in read:
        if sample.dropped != KEPT:
            yield row, None
            continue
        answers = list(zip(sample.completions, sample.labels, strict=True))
        if to == "unpaired":
            own = {name: value for name, value in further.items() if name != "margin"}
            for answer, label in answers:
                yield row, {"prompt": sample.prompt, "completion": answer, "label": label, **own}
            continue
        if to == "preference":
            good, bad = sample.completions
            yield row, {"prompt": sample.prompt, "chosen": good, "rejected": bad, **further}
            continue
        further = {name: value for name, value in further.items() if name != "margin"}
        good_answers = [answer for answer, label in answers if label]
        if to == "prompt" or (to == "messages" and not answers):
            yield row, {"messages" if to == "messages" else "prompt": sample.prompt, **further}
        elif not good_answers:
            yield row, None
        elif to == "messages":
            yield (
                row,
                {"messages": _messages(sample.prompt, "user") + _messages(good_answers[0], "assistant"), **further},
            )
        else:
            prompt, answer = _without_flags(sample.prompt, row), _without_flags(good_answers[0], row)
            yield row, {"prompt": prompt, "completion": answer, **further}


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _without_flags(messages: Any, row: int) -> Any:
    """Messages without the fields that say whether they are trained on: of such a row the completion is."""
    if isinstance(messages, list):
        pop_flags(messages, place(row, "messages"))
    return messages


def _paired(read: Sequence[tuple[int, Sample, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Pairs of the labelled answers to the same prompt: the first good one with the first bad one, and so on."""
    of_prompt: dict[str, tuple[list[Any], list[Any]]] = {}
    for each in read:
        _, sample, _ = each
        key = json.dumps(sample.prompt, sort_keys=True)
        of_prompt.setdefault(key, ([], []))[0 if sample.labels[0] else 1].append(each)
    for good, bad in of_prompt.values():
        for (row, chosen, further), (_, rejected, _) in zip(good, bad, strict=False):
            new = {"prompt": chosen.prompt, "chosen": chosen.completions[0], "rejected": rejected.completions[0]}
            yield row, {**new, **further}
        for row, _, _ in (*good[len(bad) :], *bad[len(good) :]):
            yield row, None
