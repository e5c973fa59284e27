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
    """Hide warnings of libraries that a user of the command cannot act on, and their bars of less than two seconds;
    with `verbose` the warnings alone that concern the libraries' own developers. Call it before they are imported."""
    import logging
    import os
    import warnings

    from trl.screen import fold_library_notes

    if not verbose:
        fold_library_notes()
        os.environ.setdefault("TQDM_DELAY", "2")

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # It logs at import that it looked for a faster CPU kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
