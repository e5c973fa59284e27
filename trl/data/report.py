"""What will be trained on, in a few lines that a person reads before the first step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerBase

from .packing import Packing

FEW_TRAINED = 0.05  # a smaller share of trained tokens is worth a warning
OPENING, CLOSING = "⟦", "⟧"  # around the trained parts of the sample


class Dropped(TypedDict):
    """Rows left out for one reason; `rows` are the indices of the first five."""

    reason: str
    count: int
    rows: list[int]


@dataclass
class DataReport:
    """What `tokens.prepare` read, kept, cut and dropped. Counts of tokens are after the cut unless they say otherwise.

    `lengths` holds `min`, `median`, `p95` and `max` of the kept rows, in tokens, before the cut: they tell which window
    the data want. `end_of_turn` counts the kept rows in which a token that ends a turn or a text is trained,
    `end_of_turn_token` is that token. `boundary_tokens` counts the rows in which one token covers both the end of the
    prompt and the beginning of the completion (it is not trained). `packing` is put here by who packs the rows.
    `looked_at` is the number of first rows of a stream, of which alone the report is; `parts` are the data sets of a
    mix.
    """

    name: str
    sentence: str
    rows_read: int
    rows_kept: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    max_length: int | None = None
    rows_cut: int = 0
    tokens_cut: int = 0
    trained_tokens_cut: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    end_of_turn: int = 0
    end_of_turn_token: str | None = None
    bos_doubled: int = 0
    boundary_tokens: int = 0
    sample: str = ""
    sample_row: int = 0
    packing: Packing | None = None
    looked_at: int | None = None
    parts: list["DataReport"] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Trained tokens over tokens, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def lines(self) -> list[str]:
        """The report as plain lines, warnings last but for the sample."""
        lengths = self.lengths
        lines = [
            f"{self.name}: {_rows(self.rows_read)} read, {self.rows_kept:,} kept; {self.sentence}",
            *(f"  {part.one_line()}" for part in self.parts),
            f"tokens: {self.tokens:,}, of which {self.trained_tokens:,} are trained on ({self.share:.1%})",
            f"row lengths before any cut: shortest {lengths['min']:,}, median {lengths['median']:,}, "
            f"95 % up to {lengths['p95']:,}, longest {lengths['max']:,} tokens; "
            + (f"window {self.max_length:,}" if self.max_length is not None else "no window set"),
        ]
        if self.looked_at is not None:
            first = f"first {self.looked_at:,} rows" if self.looked_at > 1 else "first row"
            lines.insert(1, f"this is a stream, tokenised as it is read: all that is said here is of its {first}")
        if self.bos_doubled:
            lines.append(f"beginning of text: written in {_rows(self.bos_doubled)} already, so not added a second time")
        packing = self.packing.lines() if self.packing is not None else []
        return [*lines, *packing, *self._ending(), *self._losses(), f"row {self.sample_row}: {self.sample}"]

    def one_line(self) -> str:
        """What the report of a mix says of one of its parts."""
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
                f"{self.trained_tokens_cut:,} of them to be trained on (raise `max_length` to keep them)"
            )
        for dropped in self.dropped:
            more = ", …" if dropped["count"] > len(dropped["rows"]) else ""
            which = ", ".join(map(str, dropped["rows"]))
            lines.append(f"warning: {_rows(dropped['count'])} dropped: {dropped['reason']} (row {which}{more})")
        if self.share < FEW_TRAINED:
            lines.append(f"warning: only {self.share:.1%} of the tokens are trained on; check the masks in the sample")
        if self.boundary_tokens:
            lines.append(
                f"warning: in {_rows(self.boundary_tokens)} the last token of the prompt reaches into the completion "
                "and is not trained; end the prompt without a space and begin the completion with it"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts."""
        return {**asdict(self), "share": self.share, "parts": [part.to_dict() for part in self.parts]}


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def show(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[bool | int], limit: int = 160
) -> str:
    """The text of a row on one line, its trained parts in ⟦ ⟧. The middle of a part longer than `limit` is left out."""
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
