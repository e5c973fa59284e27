"""The command `trl`: argv in, the library's own classes behind it."""

from __future__ import annotations

from collections.abc import Iterable

from trl.near import near


class UsageError(Exception):
    """What was typed cannot be meant: told in a sentence, exit status 2."""


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about a wrong word: the word that was probably meant, or a full stop."""
    meant = near(word, words)
    return f"; did you mean {meant}?" if meant else "."


def hide_library_notes() -> None:
    """What libraries announce to one another is nothing a user of a command can act on."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # It tells of a faster kernel for CPUs that it looked for, whoever imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
