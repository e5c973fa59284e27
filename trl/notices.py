"""Notices to the user, on stdout."""

_printed: set[str] = set()


def notify_once(sentence: str) -> None:
    """Print a notice, unless this process has printed it already."""
    if sentence not in _printed:
        _printed.add(sentence)
        print(f"trl: {sentence}", flush=True)
