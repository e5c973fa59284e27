"""Notices to the user, on stdout."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

_printed: set[str] = set()


def notify_once(sentence: str) -> None:
    """Print a notice, unless this process has printed it already. Of several processes the first alone prints."""
    if sentence not in _printed:
        _printed.add(sentence)
        if os.environ.get("RANK", "0") == "0":
            print(f"{_name()} {sentence}", flush=True)


def _name() -> str:
    """The library's name before a notice, in yellow in a terminal that knows colours."""
    plain = os.name == "nt" or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return "trl:" if plain or sys.stdout is None or not sys.stdout.isatty() else "\x1b[1;33mtrl:\x1b[0m"


class LogLines(logging.Handler):
    """Prints the library's log warnings as notices, on the first of several processes. A program that has handlers for
    log lines gets them there alone, unless `always`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.always = False
        self.held: list[str] | None = None  # if a list: it collects the lines, to print them later

    def emit(self, record: logging.LogRecord) -> None:
        if self.held is not None:
            self.held.append(record.getMessage())
        elif (self.always or not logging.getLogger().handlers) and os.environ.get("RANK", "0") == "0":
            print(f"{_name()} {record.getMessage()}", flush=True)


log_lines = LogLines()
logging.getLogger("trl").addHandler(log_lines)


@contextlib.contextmanager
def log_lines_as_notices() -> Iterator[LogLines]:
    """Within, the library's log warnings are printed as notices in any case."""
    before, log_lines.always = log_lines.always, True
    try:
        yield log_lines
    finally:
        log_lines.always, log_lines.held = before, None
