"""A data set as a method would train on it, before anything is trained: rows token by token, lengths, what the limits
cut, duplicates. No model is needed, only its tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from trl.data.reading.errors import DataError
from trl.data.report import CLOSING, OPENING
from trl.data.tokenizing import recipe
from trl.data.tokenizing.comparisons import Preferences
from trl.data.tokenizing.prompts import Prompts
from trl.data.tokenizing.recipe import Recipe
from trl.data.tokenizing.sequences import Sequences

# How the methods read rows, by their command. Methods that are not listed sample completions of prompts.
KIND_OF_METHOD = {
    **dict.fromkeys(("sft", "gkd", "iterative-sft"), "sequences"),
    **dict.fromkeys(("dpo", "orpo", "cpo", "reward"), "pairs"),
    **dict.fromkeys(("kto", "bco"), "unpaired"),
    "prm": "steps",
}
# The first of these methods whose rows the columns are is the guess.
GUESSES = ("dpo", "prm", "kto", "sft", "grpo")
MOST = 10  # rows that a list names
SEPARATOR, CUT, END_OF_CUT = "│", "✂⟨", "⟩"


@dataclass
class Piece:
    """The smallest run of tokens that is text: one token, or the tokens that make up one character.

    `trained` says whether the loss is taken on it, and `cut` whether a limit removes it.
    """

    ids: list[int]
    text: str
    trained: bool
    cut: bool


@dataclass
class InspectedRow:
    """A row before any cut: its number, its parts ("row", or "prompt", "chosen", ...), and the label, if it has one."""

    row: int
    parts: dict[str, list[Piece]]
    label: Any = None

    @property
    def tokens(self) -> int:
        """The number of tokens of all parts."""
        return sum(len(piece.ids) for pieces in self.parts.values() for piece in pieces)

    def lines(self) -> list[str]:
        """The row as plain lines: tokens between bars, trained ones in ⟦ ⟧, those that are cut in ✂⟨ ⟩."""
        trained = sum(len(piece.ids) for pieces in self.parts.values() for piece in pieces if piece.trained)
        label = "" if self.label is None else f", label {str(self.label).lower()}"
        lines = [f"row {self.row}: {self.tokens:,} tokens, {trained:,} of them trained{label}"]
        for name, pieces in self.parts.items():
            text = "".join(_runs(pieces)).replace("\n", "\\n")
            lines.append(f"  {text}" if name == "row" else f"  {name}: {text}")
        return lines


@dataclass
class Inspection:
    """What was found in a data set.

    Args:
        method: the method whose rows they are, as its command is called.
        guessed: whether the columns decided on the method.
        report: the report of a training run with the same options (`trl.data.report`).
        longest: the longest rows, as (row number, tokens before any cut).
        cut: the rows that the limits cut, the longest first: number, tokens, and tokens lost; at most ten of
            `rows_cut`.
        duplicates: rows with the tokens of an earlier row, as (row number, the earlier row's); at most ten of
            `rows_repeated`.
        prompts_repeated: rows whose prompt is that of an earlier row, or None for rows without a separate prompt.
        rows: the rows that were asked for, token by token.
    """

    method: str
    guessed: bool
    report: Any
    longest: list[tuple[int, int]]
    rows_cut: int
    cut: list[dict[str, int]]
    rows_repeated: int
    duplicates: list[tuple[int, int]]
    prompts_repeated: int | None
    rows: list[InspectedRow]

    def lines(self) -> list[str]:
        """What was found as plain lines."""
        how = f"guessed from the columns: rows for {self.method}" if self.guessed else f"rows for {self.method}"
        lines = [how, *self.report.lines()[:-1]]  # the sample, which is shortened, is left out
        lines.append("longest rows: " + ", ".join(f"{row} ({tokens:,} tokens)" for row, tokens in self.longest))
        if self.rows_cut:
            each = [f"row {at['row']} loses {at['lost']:,} of {at['tokens']:,} tokens" for at in self.cut]
            more = ", …" if self.rows_cut > len(each) else ""
            lines.append(f"rows cut: {self.rows_cut:,} in all: {', '.join(each)}{more}")
        else:
            lines.append("rows cut: none")
        more = ", …" if self.rows_repeated > len(self.duplicates) else ""
        each = [f"row {row} is row {first} again" for row, first in self.duplicates]
        found = f"{self.rows_repeated:,} in all: {', '.join(each)}{more}" if each else "none"
        lines.append(f"duplicates: {found}")
        if self.prompts_repeated:
            lines.append(f"prompts that an earlier row has too: {self.prompts_repeated:,}")
        if self.rows:
            cut = f", tokens that are cut in {CUT} {END_OF_CUT}" if self.rows_cut else ""
            lines += ["", f"tokens are separated by {SEPARATOR}, trained ones are in {OPENING} {CLOSING}{cut}"]
        for row in self.rows:
            lines += ["", *row.lines()]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """What was found as plain numbers, strings, lists and dicts."""
        rows = [{**asdict(row), "tokens": row.tokens} for row in self.rows]
        found = {name: value for name, value in vars(self).items() if name != "report"}
        return {**found, "report": self.report.to_dict(), "rows": rows}


def guess_method(dataset: datasets.Dataset, **options: Any) -> str:
    """The method whose rows a table has, by its columns. Raises `DataError` if no method reads them."""
    for method in GUESSES:
        wanted = recipe_of(method, **options)
        if method == "kto" and not {"label", "kto_tag"} & {*dataset.column_names, *(wanted.columns or ())}:
            continue
        try:
            _, shape = recipe.read_shape(wanted, dataset)
        except DataError:
            if method != GUESSES[-1]:
                continue
            # The sentence of SFT says more: it lists what is understood.
            recipe.read_shape(recipe_of("sft", **options), dataset)
        if method == "sft" and shape.columns.get("messages") == "prompt":
            continue  # conversations that wait for an answer
        return method
    raise AssertionError("the last guess returns or raises")


def recipe_of(method: str, **options: Any) -> Recipe:
    """The recipe of a method, with those of the `options` that it has. An option that is None stays at its default."""
    kind = KIND_OF_METHOD.get(method, "prompts")
    given = {name: value for name, value in options.items() if value is not None}
    cls: Any = {"sequences": Sequences, "prompts": Prompts}.get(kind, Preferences)
    if cls is Preferences:
        given["kind"] = kind
    return cls(**{name: value for name, value in given.items() if name in cls.__dataclass_fields__})


def inspect(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    method: str | None = None,
    rows: int = 5,
    name: str = "train",
    num_proc: int | None = None,
    **options: Any,
) -> Inspection:
    """Looks at a data set as a method would train on it.

    Args:
        dataset: a table.
        tokenizer: the tokenizer of the model to train.
        method: a method's command, such as "dpo". None (the default): guessed from the columns.
        rows: how many of the first rows are shown token by token; 5 by default.
        name, num_proc: as in `recipe.prepare`.
        options: fields of the method's recipe, such as `max_length`, `max_prompt_length`, `columns`,
            `assistant_only_loss`; others are ignored.

    Raises `DataError` as `recipe.prepare` does.
    """
    guessed = method is None
    method = method or guess_method(dataset, **options)
    wanted = recipe_of(method, **options)
    _, report = recipe.prepare(wanted, dataset, tokenizer, name=name, num_proc=num_proc)
    limits = ("max_length", "max_prompt_length", "max_completion_length")
    none: dict[str, Any] = {limit: None for limit in limits if limit in type(wanted).__dataclass_fields__}
    free = replace(wanted, **none)
    whole, _ = recipe.prepare(free, dataset, tokenizer, name=name, num_proc=num_proc)
    parts = [column for column in _PARTS if column in whole.column_names]
    shown = [_inspected(wanted, tokenizer, whole[at], parts) for at in range(min(rows, len(whole)))]
    numbers, lengths, lost = _lengths(wanted, whole, parts)
    by_length = np.argsort(-lengths, kind="stable")
    cut = [{"row": int(numbers[at]), "tokens": int(lengths[at]), "lost": int(lost[at])} for at in by_length if lost[at]]
    repeated = list(_repeated(whole, parts))
    prompts = list(_repeated(whole, ["prompt_ids"])) if "prompt_ids" in parts and len(parts) > 1 else None
    return Inspection(
        method=method,
        guessed=guessed,
        report=report,
        longest=[(int(numbers[at]), int(lengths[at])) for at in by_length[:MOST]],
        rows_cut=len(cut),
        cut=cut[:MOST],
        rows_repeated=len(repeated),
        duplicates=repeated[:MOST],
        prompts_repeated=None if prompts is None else len(prompts),
        rows=shown,
    )


# The columns of token ids in prepared rows, with their names for people.
_PARTS = {
    "input_ids": "row",
    "prompt_ids": "prompt",
    "chosen_ids": "chosen",
    "rejected_ids": "rejected",
    "completion_ids": "completion",
}


def _kept(wanted: Recipe, lengths: Sequence[int]) -> list[slice]:
    """The slice of each part of a row that the limits keep, for parts of these lengths."""
    nothing = slice(0, 0)
    if isinstance(wanted, Preferences):
        cut = wanted.cut(lengths[0], lengths[1:])
        return [nothing] * len(lengths) if cut is None else [slice(cut[0], None), *cut[1]]
    length = lengths[0]
    if isinstance(wanted, Prompts):
        return [slice(max(0, length - (wanted.max_prompt_length or length)), length)]
    assert isinstance(wanted, Sequences)
    limit = min(length, wanted.max_length or length)
    return [slice(length - limit, length) if wanted.truncation_mode == "keep_end" else slice(0, limit)]


def _inspected(
    wanted: Recipe, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], columns: Sequence[str]
) -> InspectedRow:
    kept = _kept(wanted, [len(row[column]) for column in columns])
    parts = {}
    for column, part in zip(columns, kept, strict=True):
        ids = list(row[column])
        if column == "input_ids":
            trained = [bool(on) for on in row["loss_mask"]]
        elif "step_mask" in row and column == "completion_ids":
            trained = [bool(on) for on in row["step_mask"]]
        else:
            trained = [column != "prompt_ids"] * len(ids)
        inside = range(len(ids))[part]
        cut = [at not in inside for at in range(len(ids))]
        parts[_PARTS[column]] = pieces(tokenizer, ids, trained, cut)
    return InspectedRow(int(row["row"]), parts, row.get("label", row.get("step_labels")))


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool], cut: Sequence[bool]
) -> list[Piece]:
    """The tokens of a row as pieces of text. `ids`, `trained` and `cut` have one entry for each token."""

    def text(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    found: list[Piece] = []
    start = 0
    while start < len(ids):
        end = start + 1
        # A token is decoded after the one before it: some tokenizers drop a space at the beginning of a text.
        before = ids[max(0, start - 1) : start]
        shown = text([*before, *ids[start:end]])[len(text(before)) :]
        # A character of several tokens is whole only with the last of them. None has more than four bytes.
        while shown.endswith("\N{REPLACEMENT CHARACTER}") and end < min(len(ids), start + 4):
            longer = text([*before, *ids[start : end + 1]])[len(text(before)) :]
            alike = trained[end] == trained[start] and cut[end] == cut[start]
            if not alike:
                break
            end += 1
            shown = longer
        found.append(Piece(list(ids[start:end]), shown, bool(trained[start]), bool(cut[start])))
        start = end
    return found


def _runs(some: Sequence[Piece]) -> Iterator[str]:
    """The pieces as text, with marks around the trained and around the cut ones."""
    start = 0
    for end in range(1, len(some) + 1):
        first = some[start]
        if end < len(some) and (some[end].trained, some[end].cut) == (first.trained, first.cut):
            continue
        text = SEPARATOR.join(piece.text for piece in some[start:end])
        text = f"{OPENING}{text}{CLOSING}" if first.trained else text
        text = f"{CUT}{text}{END_OF_CUT}" if first.cut else text
        yield text if start == 0 or first.trained or first.cut or some[start - 1].trained else SEPARATOR + text
        start = end


def _lengths(
    wanted: Recipe, whole: datasets.Dataset, columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of each row, its tokens before any cut (a pair's: prompt and longer completion), and those lost."""
    numbers = np.asarray(whole["row"])
    counts = np.array([[len(row[column]) for column in columns] for row in whole.select_columns(list(columns))])
    completions = counts[:, 1:].max(axis=1) if counts.shape[1] > 1 else 0
    lost = [
        sum(count - len(range(count)[part]) for count, part in zip(row, _kept(wanted, row), strict=True))
        for row in counts.tolist()
    ]
    return numbers, counts[:, 0] + completions, np.asarray(lost)


def _repeated(whole: datasets.Dataset, columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The rows that have the tokens of an earlier row in all `columns`, each with that row's number."""
    seen: dict[tuple[bytes, ...], int] = {}
    for row in whole.select_columns([*columns, "row", *(["label"] if "label" in whole.column_names else [])]):
        key = tuple(np.asarray(row[column], dtype=np.int64).tobytes() for column in columns)
        key = (*key, str(row.get("label")).encode()) if len(columns) > 1 else key
        first = seen.setdefault(key, int(row["row"]))
        if first != int(row["row"]):
            yield int(row["row"]), first
