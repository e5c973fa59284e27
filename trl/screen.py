"""What a terminal shows: numbers, sparklines, labelled paragraphs, and the messages of other libraries.

All of it is printed on the console of `rich.get_console()`, so that what is printed while a bar stands goes above it.
"""

import logging
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"
CAUTIONS = ("warning:", "caution:")

# Messages that tell a user nothing: by logger, how they begin.
NOTES = {
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    "DeepSpeed": "Setting accelerator to CPU",
}


def is_terminal(console: Console) -> bool:
    """Whether lines on the console can be drawn again: a terminal, and not a file, whatever FORCE_COLOR says."""
    if console.is_dumb_terminal or not console.is_terminal:
        return False
    return console.file is not sys.stdout or (sys.stdout is not None and sys.stdout.isatty())


def number(value: Any) -> str:
    """A number as people read it, with about four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def change(value: float) -> str:
    """A difference, with its sign."""
    return number(value) if value < 0 or not math.isfinite(value) else f"+{number(value)}"


def duration(seconds: float) -> str:
    """Minutes and seconds, `2:03`, and hours where there are some, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def key_values(entries: Mapping[str, Any]) -> str:
    """`key=value` with spaces between; floats with six digits; text with spaces in quotes."""
    return " ".join(f"{name}={_plain(value)}" for name, value in entries.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(each.isspace() or each == "=" for each in text) else text


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """The course of the values in at most `width` characters. Each stands for the mean of a part of them, as high as it
    lies between the lowest and the highest."""
    known = [float(value) for value in values if math.isfinite(value)]
    parts = min(width, len(known))
    cuts = [len(known) * place // parts for place in range(parts + 1)] if parts else []
    means = [sum(known[low:high]) / (high - low) for low, high in zip(cuts, cuts[1:], strict=False)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return blocks[len(blocks) // 2] * len(means)
    top = len(blocks) - 1
    return "".join(blocks[round((mean - low) / (high - low) * top)] for mean in means)


def blocks_of(options: ConsoleOptions) -> str:
    return BLOCKS if options.encoding.startswith("utf") else PLAIN_BLOCKS


def is_caution(line: str) -> bool:
    return line.lstrip().startswith(CAUTIONS)


def paragraphs(console: Console, groups: Mapping[str, Sequence[str]]) -> None:
    """Print groups of lines: in a terminal as two columns, the name of the group and its lines, else one a line."""
    if not is_terminal(console):
        for line in (line for lines in groups.values() for line in lines):
            print(f"trl: {line}", flush=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for name, lines in groups.items():
        for place, line in enumerate(lines):
            style = "bold yellow" if is_caution(line) else ""
            heading = Text(name if place == 0 else "", style=style or "bold")
            starts = (f"{name}: ", *(f"{each} " for each in CAUTIONS if name == "caution"))
            start = next((each for each in starts if line.strip().startswith(each)), "")
            table.add_row(heading, Text(line.strip().removeprefix(start), style=style))
    console.print(table, "")


class _Notes(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def fold_library_notes() -> None:
    """Leave out the messages of other libraries that tell a user nothing."""
    # peft asks transformers by a name that 5.2x renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    for name, beginning in NOTES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Notes) for each in logger.filters):
            logger.addFilter(_Notes(beginning))
