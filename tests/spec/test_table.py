"""The table covers the whole document, and says nothing that is not so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Guide
from .document import Block, blocks, pieces
from .table import CHANGES, ROWS, row_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_every_piece_of_the_document_has_a_row(guide: Guide) -> None:
    bare = [f"line {piece.line}: {piece.text}" for piece in guide.pieces if row_of(piece) is None]
    assert not bare
    assert len(guide.blocks) == 22 and {block.language for block in guide.blocks} == {"bash", "python", ""}


def test_every_row_and_change_is_used(guide: Guide) -> None:
    used = [row_of(piece) for piece in guide.pieces]
    assert [row.text for row in ROWS if row not in used] == []
    whole = "".join(block.text for block in guide.blocks)
    assert [change.old for change in CHANGES if change.old not in whole] == []


def names_of_tests() -> set[str]:
    return {name for file in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}


def test_every_row_has_its_test_or_its_reason() -> None:
    for row in ROWS:
        assert bool(row.test) != bool(row.not_run), row
        assert not row.test or row.test in names_of_tests(), row
        for file in re.findall(r"tests/\S+\.py", row.not_run):
            assert (ROOT / file).exists(), file


def test_the_page_of_the_docs_names_every_test_and_line_of_today() -> None:
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", page)) <= names_of_tests()
    for file in re.findall(r"`(tests/\S+\.py)`", page):
        assert (ROOT / file).exists(), file
    assert [row.text for row in ROWS if f"`{row.test}`" not in page and row.test] == []
    assert [row.today for row in ROWS if row.today not in page] == []


def test_a_further_block_is_seen() -> None:
    markdown = "text\n```python\nimport trl\n```\n\n```bash\n# only a comment\n\ntrl env\n```\n"
    found = [piece for block in blocks(markdown) for piece in pieces(block)]
    assert [(piece.line, piece.text, row_of(piece)) for piece in found] == [
        (2, "import trl\n", None),
        (9, "trl env\n", None),
    ]
    with pytest.raises(ValueError, match="the block at line 2 is not closed"):
        blocks("text\n```python\nimport trl\n")


def test_a_shell_block_is_cut_into_commands() -> None:
    text = """
        pip install a  # it's a comment
        trl sft \\
          --bf16
        python3 -c "
        print('(')
        "
        python3 << 'EOF'
        print("it's")
        EOF
        model = load(
            name,
        )
        beta=0.05  # smaller
    """
    lines = "\n".join(line[8:] for line in text.strip("\n").splitlines())
    assert [piece.text for piece in pieces(Block(0, "bash", lines))] == [
        "pip install a  # it's a comment\n",
        "trl sft \\\n  --bf16\n",
        "python3 -c \"\nprint('(')\n\"\n",
        "python3 << 'EOF'\nprint(\"it's\")\nEOF\n",
        "model = load(\n    name,\n)\n",
        "beta=0.05  # smaller\n",
    ]
    with pytest.raises(ValueError, match="the command at line 1 has no end"):
        pieces(Block(0, "bash", "trl sft \\\n"))


@pytest.mark.parametrize("row", [row for row in ROWS if row.today], ids=lambda row: row.today[:12])
def test_the_line_of_today_exists(row: object) -> None:
    """The command and its subcommands, as its maker's help lists them."""
    words = [word for word in row.today.split() if re.fullmatch(r"[a-z]+", word)]  # type: ignore[attr-defined]
    program = Path(sys.executable).parent / words[0]
    if not program.exists():
        pytest.skip("huggingface_hub is older than `hf`")
    done = subprocess.run([program, *words[1:], "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{' '.join(words)} " in done.stdout
