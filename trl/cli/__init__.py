"""The command `trl`: parses argv and calls the library's own classes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from trl.near import near


class UsageError(Exception):
    """A wrong command line: printed as one sentence, with exit status 2."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command with options of its own. `examples` end its help. Raises UsageError."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` lists the options.")


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the word that was probably meant, or a full stop."""
    meant = near(word, words)
    return f"; did you mean {meant}?" if meant else "."


@contextlib.contextmanager
def notices_aside(aside: bool) -> Iterator[None]:
    """With `aside`, what is printed within goes to stderr: stdout is for the JSON that a program reads."""
    with contextlib.redirect_stdout(sys.stderr) if aside else contextlib.nullcontext():
        yield


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
