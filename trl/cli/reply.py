"""Answers of commands that a program may read: `--json`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ReplyFields:
    """How the command answers."""

    json: bool = field(default=False, metadata={"help": "Print the result as JSON on stdout, all else on stderr."})


@contextlib.contextmanager
def reply(as_json: bool) -> Iterator[Callable[[Any, str], None]]:
    """A function that prints a result: its facts as one line of JSON, or a text. With JSON, what else is printed within
    the context goes to stderr."""
    out = sys.stdout

    def answer(facts: Any, text: str) -> None:
        print(json.dumps(facts, ensure_ascii=False) if as_json else text, file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr if as_json else out):
        yield answer
