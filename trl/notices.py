"""Notices to the user, on stdout."""

import os

_printed: set[str] = set()


def notify_once(sentence: str) -> None:
    """Print a notice, unless this process has printed it already. Of several processes the first alone prints."""
    if sentence not in _printed:
        _printed.add(sentence)
        if os.environ.get("RANK", "0") == "0":
            print(f"trl: {sentence}", flush=True)
