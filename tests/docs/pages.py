"""The pages of the documentation, and the blocks of code in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
RUN = ("python", "bash", "sh")  # languages whose blocks are run
SHOWN = ("text", "yaml", "json", "jsonl", "bibtex")  # and those that are only shown
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of its first line of code
    not_run: str  # the reason, or ""

    @property
    def file(self) -> str:
        """The name of the file that the block is, where its first line is a comment with that name alone."""
        match = re.fullmatch(r"# ([\w/]+\.py)", self.code.partition("\n")[0])
        return match[1] if match and self.language == "python" else ""


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page."""
    found: list[Block] = []
    lines, place = text.splitlines(), 0
    while place < len(lines):
        fence = re.fullmatch(r"(`{3,})\s*(\S*).*", lines[place])
        if fence is None:
            place += 1
            continue
        above = [line for line in lines[:place] if line.strip()]
        reason = NOT_RUN.fullmatch(above[-1]) if above else None
        end = next(at for at in range(place + 1, len(lines)) if lines[at].rstrip() == fence[1])
        code = "\n".join(lines[place + 1 : end])
        found.append(Block(fence[2], code, place + 2, reason[1] if reason else ""))
        place = end + 1
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
