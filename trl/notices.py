"""Notices to the user, on stdout."""

import os
import sys

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
