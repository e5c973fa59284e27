"""Every message that the pages on troubleshooting quote is one that the code can print."""

import ast
import re

import pytest

from tests.docs.pages import ROOT


def strings_of_the_code():
    """The fixed parts of every string in the library, a list for each string."""
    found = []
    for path in (ROOT / "trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            fixed = [" ".join(text.split()) for text in fixed if len(text.strip()) > 8]
            if fixed:
                found.append(fixed)
    return found


def quotes(text):
    """The block quotes of a page, each on one line."""
    parts = re.findall(r"(?:^>.*\n)+", text, re.MULTILINE)
    return [" ".join(part.replace("\n> ", " ").lstrip("> ").split()) for part in parts]


@pytest.mark.parametrize("page", ["troubleshooting.md", "zh/troubleshooting.md"])
def test_quoted_messages_are_printed_by_the_code(page):
    strings = strings_of_the_code()
    found = quotes((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert found
    for quote in found:
        # Some string of the code makes up a good part of the message.
        said = max(sum(len(part) for part in fixed if part in quote) for fixed in strings)
        assert said >= min(25, 0.3 * len(quote)), quote
