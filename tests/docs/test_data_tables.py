"""Every row in the tables of docs/data.md is read as the table says."""

import json
import re

import pytest

from tests.docs.pages import ROOT
from trl.data.reading.formats import detect
from trl.data.reading.readings import PAIR_READINGS, READINGS, STEP_READINGS, UNPAIRED_READINGS
from trl.data.reading.sources import load

KINDS = {"sft": READINGS, "pairs": PAIR_READINGS, "labelled": UNPAIRED_READINGS, "steps": STEP_READINGS}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_as_the_table_says(kind):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition(f"<!-- rows: {kind} -->")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\{.*\})` \| (.*) \|$", table, re.MULTILINE)
    assert rows
    for row, reading in rows:
        assert detect(load([json.loads(row)]), readings=KINDS[kind]).sentence.endswith(f": read as {reading}")
