"""The command `trl`: parses argv and calls the library's own classes."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from trl import outputs
from trl.near import near
from trl.notices import log_lines_as_notices
from trl.options import Limit


class UsageError(Exception):
    """A wrong command line: printed as one sentence, with exit status 2."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command with options of its own. `examples` end its help. In names of options, `-` is `_`. Raises
    UsageError, with the nearest name for an unknown one."""

    def __init__(self, prog: str, description: str, examples: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The options. All of argv must be known; `parse_known_args` leaves the rest."""
        words = [with_underscores(word) for word in args or ()]
        for word in words:
            flag = word.partition("=")[0]
            if word == "--":
                break
            if flag.startswith("--") and flag not in self._option_string_actions:
                names = [name[2:] for name in self._option_string_actions if name.startswith("--")]
                raise no_option(flag, dict(zip(names, names, strict=True)), self.prog)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}. `{self.prog} --help` lists the options.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            raise UsageError(f"{name}: needs one of {', '.join(known)}, not `{value}`{nearest(str(value), known)}")


def numbers(limit: Limit) -> Callable[[str], float]:
    """The type of an option that takes a number within a limit, for `add_argument`."""

    def number(word: str) -> float:
        try:
            value = int(word) if limit.whole else float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not limit.holds(value):
            raise argparse.ArgumentTypeError(f"needs {limit.wanted()}, not `{word}`")
        return value

    return number


def with_underscores(word: str) -> str:
    """`--learning-rate=1` as `--learning_rate=1`; values are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def check_folder(path: str, new: bool = False) -> None:
    """Raise UsageError if nothing can be written into the folder; with `new`, also if it exists."""
    if problem := outputs.folder_problem(path, new):
        raise UsageError(f"{problem}.")


def check_file(path: str, replace: bool = False, remedy: str = "") -> None:
    """Raise UsageError if the file cannot be written. One that exists is possible with `replace` alone."""
    if problem := outputs.file_problem(path, replace, remedy):
        raise UsageError(f"{problem}.")


def no_option(flag: str, known: Mapping[str, str], *programs: str) -> UsageError:
    """The error for an unknown option. `known` maps names of options, older ones too, to the present ones; `programs`
    are those whose help lists them."""
    match = near(flag[2:], known)  # without the dashes, which all share
    meant = f"; did you mean --{known[match]}?" if match else "."
    helps = " and ".join(f"`{program} --help`" for program in programs)
    return UsageError(f"there is no option {flag}{meant} {helps} {'list' if len(programs) > 1 else 'lists'} them.")


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the word that was probably meant, or a full stop."""
    meant = near(word, words)
    return f"; did you mean {meant}?" if meant else "."


@contextlib.contextmanager
def notices_aside(aside: bool) -> Iterator[None]:
    """With `aside`, what is printed within goes to stderr: stdout is for the JSON that a program reads."""
    with contextlib.redirect_stdout(sys.stderr) if aside else contextlib.nullcontext(), log_lines_as_notices():
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
