"""Reports of what will be trained on, in a few lines that a person reads before the first step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, ClassVar, TypedDict

from transformers import PreTrainedTokenizerBase

FEW_TRAINED = 0.05  # a smaller share of trained tokens causes a warning
UNREADABLE = "cannot be read, left out by skip_bad_rows"  # a reason in `Dropped`
OPENING, CLOSING = "⟦", "⟧"  # around the trained parts of the sample


class Dropped(TypedDict):
    """Rows left out for one reason. `rows` are the numbers of the first five."""

    reason: str
    count: int
    rows: list[int]


@dataclass
class Packing:
    """How rows were packed.

    Args:
        strategy, capacity: the strategy, and the most tokens of a packed row.
        rows, packed_rows, tokens: numbers of rows before and after, and of tokens after.
        fill: tokens over capacity, 0 to 1.
        rows_split: rows that were split into pieces.
        labels_lost: trained tokens that lost their label, because they begin a piece of a split row.
        tokens_cut: tokens beyond the capacity that were cut off.
    """

    strategy: str
    capacity: int
    rows: int
    packed_rows: int
    tokens: int
    fill: float
    rows_split: int = 0
    labels_lost: int = 0
    tokens_cut: int = 0

    def lines(self) -> list[str]:
        """The report as plain lines."""
        lines = [
            f"packing ({self.strategy}): {self.rows:,} rows in {self.packed_rows:,} of {self.capacity:,} tokens, "
            f"{self.fill:.1%} full"
        ]
        if self.rows_split:
            lines.append(
                f"packing: {self.rows_split:,} rows are split; the {self.labels_lost:,} tokens that begin a "
                "later piece are not trained, because no token stands before them"
            )
        if self.tokens_cut:
            lines.append(f"warning: packing cut off {self.tokens_cut:,} tokens of rows longer than {self.capacity:,}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers and strings."""
        return asdict(self)


@dataclass(kw_only=True)
class Report:
    """What was read of a data set, for people (`lines`) and for programs (`to_dict`).

    Args:
        name: what the data set is called: "train", or a name that begins with "eval" or "test".
        sentence: how its rows were read.
        rows_read, rows_kept: numbers of rows.
        lengths: `min`, `median`, `p95` and `max` of the kept rows, in tokens, before any cut.
        dropped: the rows left out, one entry for each reason.
        bos_doubled: kept rows whose text already begins with a beginning of text, so that none was added.
        sample, sample_row: the text of the first kept row, and its number.
        looked_at: for a stream, the number of its first rows, which alone the report covers; else None.
        parts: the reports of the data sets of a mix.
    """

    name: str
    sentence: str
    rows_read: int
    rows_kept: int
    lengths: dict[str, int]
    dropped: list[Dropped] = field(default_factory=list)
    bos_doubled: int = 0
    sample: str = ""
    sample_row: int = 0
    looked_at: int | None = None
    parts: list[Any] = field(default_factory=list)

    # The fields that are summed, and the summaries of lengths that are joined, in the report of a mix of streams.
    COUNTS: ClassVar[tuple[str, ...]] = ("rows_read", "rows_kept", "bos_doubled")
    SUMMARIES: ClassVar[tuple[str, ...]] = ("lengths",)

    @classmethod
    def of_parts(cls, parts: Sequence[Any], name: str, sentence: str) -> Any:
        """The report of a mix of streams. They have no full table: counts are summed, medians are medians of the parts,
        and the 95th percentile is the largest of the parts."""
        sums: dict[str, Any] = {count: sum(getattr(part, count) for part in parts) for count in cls.COUNTS}
        joined: dict[str, Any] = {each: _joined([getattr(part, each) for part in parts]) for each in cls.SUMMARIES}
        return replace(
            parts[0],
            name=name,
            sentence=sentence,
            parts=list(parts),
            dropped=[entry for part in parts for entry in part.dropped],
            looked_at=sum(part.looked_at or 0 for part in parts),
            **sums,
            **joined,
        )

    def add_unreadable(self, rows: Sequence[int]) -> None:
        """Adds rows, by their numbers, that could not be read and were left out."""
        if rows:
            self.rows_read += len(rows)
            self.dropped.insert(0, {"reason": UNREADABLE, "count": len(rows), "rows": list(rows[:5])})

    def lines(self) -> list[str]:
        """The report as plain lines; the sample is the last."""
        stream, bos = [], []
        if self.looked_at is not None:
            first = f"first {self.looked_at:,} rows" if self.looked_at > 1 else "first row"
            stream = [f"this is a stream, tokenised as it is read: this report covers only its {first}"]
        if self.bos_doubled:
            bos = [f"beginning of text: written in {_rows(self.bos_doubled)} already, so not added a second time"]
        parts = [f"  {part.one_line()}" for part in self.parts]
        sample = f"row {self.sample_row}: {self.sample}"
        return [self._heading(), *stream, *parts, *self._measures(), *bos, *self._findings(), sample]

    def one_line(self) -> str:
        """The line for one data set in the report of a mix."""
        raise NotImplementedError

    def _heading(self) -> str:
        raise NotImplementedError

    def _measures(self) -> list[str]:
        raise NotImplementedError

    def _findings(self) -> list[str]:
        return self._drops()

    def _drops(self) -> list[str]:
        lines = []
        for dropped in self.dropped:
            more = ", …" if dropped["count"] > len(dropped["rows"]) else ""
            which = ", ".join(map(str, dropped["rows"]))
            lines.append(f"warning: {_rows(dropped['count'])} dropped: {dropped['reason']} (row {which}{more})")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts."""
        return {**asdict(self), "parts": [part.to_dict() for part in self.parts]}


@dataclass(kw_only=True)
class PromptReport(Report):
    """The report of prompts.

    Args:
        conversational: whether the prompts are conversations, and not strings.
        cut: prompts that lost their beginning to fit `max_prompt_length` (None: no limit).
        columns: the columns that reward functions can read.
    """

    conversational: bool
    cut: int = 0
    max_prompt_length: int | None = None
    columns: list[str] = field(default_factory=list)

    COUNTS: ClassVar[tuple[str, ...]] = (*Report.COUNTS, "cut")

    @classmethod
    def of_parts(cls, parts: Sequence[Any], name: str, sentence: str) -> Any:
        report = super().of_parts(parts, name, sentence)
        report.columns = list(dict.fromkeys(column for part in parts for column in part.columns))
        return report

    def _heading(self) -> str:
        return f"{self.one_line()}; columns for reward functions: {', '.join(self.columns) or 'none'}"

    def one_line(self) -> str:
        return f"{self.name}: {self.rows_kept:,} prompts; {self.sentence}"

    def _measures(self) -> list[str]:
        lengths = self.lengths
        return [
            f"prompt lengths: shortest {lengths['min']:,}, median {lengths['median']:,}, longest {lengths['max']:,} "
            "tokens"
        ]

    def _findings(self) -> list[str]:
        cut = f"warning: {self.cut:,} prompts lost their beginning to fit max_prompt_length={self.max_prompt_length}"
        return [*([cut] if self.cut else []), *self._drops()]


@dataclass(kw_only=True)
class DataReport(Report):
    """The report of rows that are trained on. Counts of tokens are after the cut unless they say otherwise.

    Args:
        tokens, trained_tokens: numbers of tokens, and of those in the loss.
        max_length: the limit of a row in tokens. None: no limit.
        rows_cut, tokens_cut, trained_tokens_cut: rows longer than `max_length`, and the tokens that they lost.
        end_of_turn: the kept rows in which the token that ends the last turn, or the text, is trained.
        end_of_turn_token: that token.
        boundary_tokens: the rows in which one token covers both the end of the prompt and the beginning of the
            completion. It is not trained.
        packing: how the rows were packed, if they were.
    """

    tokens: int
    trained_tokens: int
    max_length: int | None = None
    rows_cut: int = 0
    tokens_cut: int = 0
    trained_tokens_cut: int = 0
    end_of_turn: int = 0
    end_of_turn_token: str | None = None
    boundary_tokens: int = 0
    packing: Packing | None = None

    COUNTS: ClassVar[tuple[str, ...]] = (
        *Report.COUNTS,
        *("tokens", "trained_tokens", "rows_cut", "tokens_cut", "trained_tokens_cut"),
        *("end_of_turn", "boundary_tokens"),
    )

    @property
    def trains(self) -> bool:
        """Whether the rows are trained on. Warnings about what a model learns are left out for evaluation data."""
        return not self.name.startswith(("eval", "test"))

    @property
    def share(self) -> float:
        """Trained tokens over tokens, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def _heading(self) -> str:
        return f"{self.name}: {_rows(self.rows_read)} read, {self.rows_kept:,} kept; {self.sentence}"

    def _findings(self) -> list[str]:
        packing = self.packing.lines() if self.packing is not None else []
        ending = self._ending() if self.trains else []
        return [*packing, *ending, *self._losses()]

    def _measures(self) -> list[str]:
        lengths = self.lengths
        return [
            f"tokens: {self.tokens:,}, {self.trained_tokens:,} of them trained on ({self.share:.1%})",
            f"row lengths before any cut: shortest {lengths['min']:,}, median {lengths['median']:,}, "
            f"95th percentile {lengths['p95']:,}, longest {lengths['max']:,} tokens; "
            + (f"window {self.max_length:,}" if self.max_length is not None else "no window set"),
        ]

    def one_line(self) -> str:
        return (
            f"{self.name}: {_rows(self.rows_read)} read, {self.rows_kept:,} kept, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained; {self.sentence}"
        )

    def _ending(self) -> list[str]:
        if self.end_of_turn == self.rows_kept:
            return [f"end of turn: {self.end_of_turn_token!r} is trained in every row"]
        if self.end_of_turn:
            return [
                f"warning: the end of turn {self.end_of_turn_token!r} is trained in only {self.end_of_turn:,} of "
                f"{_rows(self.rows_kept)}; on the others the model does not learn to stop"
            ]
        return [
            "warning: no end of turn and no end of text is in the loss, so the model does not learn to stop; check the "
            "chat template, `eos_token` and `max_length`"
        ]

    def _losses(self) -> list[str]:
        lines = []
        if self.rows_cut:
            lines.append(
                f"warning: {_rows(self.rows_cut)} cut to {self.max_length:,} tokens; {self.tokens_cut:,} tokens lost, "
                f"{self.trained_tokens_cut:,} of them {'to be trained on' if self.trains else 'in the loss'} "
                "(raise `max_length` to keep them)"
            )
        lines += self._drops()
        if self.share < FEW_TRAINED and self.trains:
            lines.append(f"warning: only {self.share:.1%} of the tokens are trained on; check the masks in the sample")
        if self.boundary_tokens and self.trains:
            lines.append(
                f"warning: in {_rows(self.boundary_tokens)} the last token of the prompt reaches into the completion "
                "and is not trained; end the prompt without a space and begin the completion with it"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts."""
        return {**super().to_dict(), "share": self.share}


@dataclass(kw_only=True)
class PreferenceReport(DataReport):
    """The report of judged completions.

    A prompt counts once in all counts of tokens, however many completions it has. `lengths` are those of prompts with
    the longer completion. `trained_tokens` are those of the completions; in rows of steps, one for each judged step.
    `boundary_tokens` counts the rows in which the prompt alone has other tokens at its end than before a completion.

    Args:
        kind: "pairs", "unpaired" or "steps".
        prompt_lengths, completion_lengths: summaries like `lengths`, of prompts and of completions.
        limits: the options that limit lengths, by name.
        prompts_cut, prompt_tokens_cut, completions_cut, completion_tokens_cut: what the limits removed.
        empty_completions: completions without text.
        labels_true, labels_false: numbers of rows, or of steps, with these labels.
    """

    kind: str = "pairs"
    prompt_lengths: dict[str, int] = field(default_factory=dict)
    completion_lengths: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    completions_cut: int = 0
    completion_tokens_cut: int = 0
    empty_completions: int = 0
    labels_true: int = 0
    labels_false: int = 0

    COUNTS: ClassVar[tuple[str, ...]] = (
        *DataReport.COUNTS,
        *("prompts_cut", "prompt_tokens_cut", "completions_cut", "completion_tokens_cut"),
        *("empty_completions", "labels_true", "labels_false"),
    )
    SUMMARIES: ClassVar[tuple[str, ...]] = ("lengths", "prompt_lengths", "completion_lengths")

    def _measures(self) -> list[str]:
        def long(lengths: dict[str, int]) -> str:
            return f"median {lengths['median']:,}, 95th percentile {lengths['p95']:,}, longest {lengths['max']:,}"

        what = "judged steps" if self.kind == "steps" else "trained on"
        window = f"window {self.max_length:,}" if self.max_length is not None else "no window set"
        lines = [
            f"tokens: {self.tokens:,}, each prompt counted once, {self.trained_tokens:,} of them {what} "
            f"({self.share:.1%})",
            f"lengths before any cut: prompts {long(self.prompt_lengths)}; completions {long(self.completion_lengths)} "
            f"tokens; {window}",
        ]
        if self.kind != "pairs":
            lines.append(f"labels: {self.labels_true:,} true, {self.labels_false:,} false")
        return lines

    def _ending(self) -> list[str]:
        return [] if self.kind == "steps" else super()._ending()

    def _losses(self) -> list[str]:
        lines = []
        if self.rows_cut:
            what = "1 pair" if self.rows_cut == 1 else f"{self.rows_cut:,} pairs"
            limits = ", ".join(f"{limit} {value:,}" for limit, value in self.limits.items())
            losses = [
                f"{self.prompt_tokens_cut:,} of the prompts' tokens (in {_rows(self.prompts_cut)})",
                f"{self.completion_tokens_cut:,} of the completions' (in {_rows(self.completions_cut)})",
            ]
            lost = [loss for loss, count in zip(losses, (self.prompts_cut, self.completions_cut), strict=True) if count]
            lines.append(
                f"warning: {what if self.kind == 'pairs' else _rows(self.rows_cut)} cut, which lost "
                f"{' and '.join(lost)}; limits are {limits} (raise them to keep all)"
            )
        lines += self._drops()
        if self.empty_completions and self.trains:
            what = "steps are" if self.kind == "steps" else "completions are"
            what = what if self.empty_completions > 1 else what.replace("s are", " is")
            lines.append(f"warning: {self.empty_completions:,} {what} empty; the model learns to give empty answers")
        if self.boundary_tokens and self.trains:
            lines.append(
                f"warning: in {_rows(self.boundary_tokens)} the prompt alone ends in other tokens than before its "
                "completion, and the differing tokens are trained with the completion; end the prompt without a space, "
                "or set a chat template that writes both the same way"
            )
        return lines


def _joined(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {
        "min": min(part["min"] for part in parts),
        "median": round(median(part["median"] for part in parts)),
        "p95": max(part["p95"] for part in parts),
        "max": max(part["max"] for part in parts),
    }


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def show(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[bool | int], limit: int = 160
) -> str:
    """The text of a row on one line, its trained parts in ⟦ ⟧.

    `input_ids` and `loss_mask` have the same length. A part longer than `limit` characters (160 by default) loses its
    middle.
    """
    parts = []
    start = 0
    for end in range(1, len(input_ids) + 1):
        if end < len(input_ids) and bool(loss_mask[end]) == bool(loss_mask[start]):
            continue
        text = str(tokenizer.decode(list(input_ids[start:end]), skip_special_tokens=False))
        if len(text) > limit:
            text = f"{text[: limit // 2]} … {text[-(limit // 2) :]}"
        text = text.replace("\n", "\\n")
        parts.append(f"{OPENING}{text}{CLOSING}" if loss_mask[start] else text)
        start = end
    return "".join(parts)
