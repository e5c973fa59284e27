"""Reads the guide: its code blocks, and the pieces that one types or runs.

The document lies in `shared/spec` beside the repository; `TRL_GUIDE` names another folder.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ.get("TRL_GUIDE") or Path(__file__).parents[3] / "shared" / "spec")
DOCUMENT = FOLDER / "trl-guide.zh.md"


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    line: int  # of its fence
    language: str
    text: str


@dataclass(frozen=True)
class Piece:
    """What is run or typed at once: a whole block of Python, one command of a shell block, one setting."""

    line: int
    language: str
    text: str


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks, in their order. ValueError if the last one is not closed."""
    found: list[Block] = []
    inside: list[str] | None = None
    language, began = "", 0
    for number, line in enumerate(markdown.splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, language, began = [], line[3:].strip(), number
        else:
            found.append(Block(began, language, "\n".join(inside) + "\n"))
            inside = None
    if inside is not None:
        raise ValueError(f"the block at line {began} is not closed")
    return found


def pieces(block: Block) -> list[Piece]:
    """A block of a shell as its commands, without comments between them; any other block as it is."""
    if block.language != "bash":
        return [Piece(block.line, block.language, block.text)]
    found: list[Piece] = []
    lines: list[str] = []
    began = 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if not lines and (not line.strip() or line.startswith("#")):
            continue
        began = began if lines else number
        lines.append(line)
        if _is_whole(lines):
            found.append(Piece(began, block.language, "\n".join(lines) + "\n"))
            lines = []
    if lines:
        raise ValueError(f"the command at line {began} has no end")
    return found


def _is_whole(lines: list[str]) -> bool:
    """Whether a command ends here: no open here-document, quote, bracket or continued line."""
    text = "\n".join(lines)
    here_document = re.search(r"<<\s*'?(\w+)'?$", lines[0])
    if here_document:
        return lines[-1] == here_document[1]
    if text.endswith("\\"):
        return False
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # an open quote
        return False
    # Python among shell lines: a call over several lines.
    return " = " not in lines[0] or sum(word.count("(") - word.count(")") for word in words) == 0


def settings(pieces: list[Piece]) -> dict[str, str]:
    """`name=value` lines of a shell block, as words: what the guide advises to put into a script."""
    found = {}
    for piece in pieces:
        matched = re.fullmatch(r"(\w+)=(\S+)(?:\s+#.*)?\n", piece.text)
        if matched:
            found[matched[1]] = matched[2]
    return found
