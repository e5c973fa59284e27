"""Links between pages lead to files that exist, and every block says its language."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, RUN, SHOWN, blocks, name_of

ROOT_PAGES = [*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]


@pytest.mark.parametrize("page", ROOT_PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_its_language(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        known = block.language in (*RUN, *SHOWN) or block.language.startswith("{")
        assert known, f"line {block.line}: a block in {block.language or 'no language'}"
        assert not block.not_run or block.language in RUN, f"line {block.line}: it would not be run anyway"
