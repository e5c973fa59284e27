"""The command `trl`: parses argv and calls the library's own classes."""

from __future__ import annotations

from collections.abc import Iterable

from trl.near import near


class UsageError(Exception):
    """A wrong command line: printed as one sentence, with exit status 2."""


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the word that was probably meant, or a full stop."""
    meant = near(word, words)
    return f"; did you mean {meant}?" if meant else "."


def hide_library_notes(verbose: bool = False) -> None:
    """Hide warnings of libraries that a user of the command cannot act on; with `verbose` those alone that are meant
    for the libraries' own developers."""
    import logging
    import warnings

    from trl.screen import fold_library_notes

    if not verbose:
        fold_library_notes()

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # It logs at import that it looked for a faster CPU kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
