"""The pages of methods cover every row of the table, and the metrics that they explain are ones that the code logs."""

import re

import pytest

from tests.docs.pages import ROOT
from trl.methods import METHODS

PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
CODE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl").rglob("*.py"))
OF_TRANSFORMERS = {"loss", "grad_norm"}


def test_every_method_has_its_example_and_its_command():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, method in METHODS.items():
        assert f"{method.name}Trainer(" in text, name
        assert not method.command or f"\ntrl {name} --model_name_or_path" in text, name
        assert method.paper is None or method.paper.arxiv in text, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_metrics_are_logged(page):
    text = page.read_text(encoding="utf-8")
    tables = re.findall(r"^\| metric \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    names = {
        name for table in tables for row in table.splitlines() for name in re.findall(r"`(.+?)`", row.split("|")[1])
    }
    assert names
    for name in sorted(names - OF_TRANSFORMERS):
        # A name may be put together from parts: `rewards/{which}`, `completions/mean_{what}`.
        parts = re.split(r"/|_(?=[a-z]+$)", re.sub(r"<\w+>", "{name}", name))
        shapes = {name, "/".join([parts[0], "{which}"]), "/".join([parts[0], "{name}", "mean"])}
        shapes |= {re.sub(r"_[a-z]+$", "_{what}", name), "objective/{name}"}
        assert any(f'"{shape}"' in CODE for shape in shapes), name
