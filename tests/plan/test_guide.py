"""The hardware tables of the user's guide as runs: `docs/planning.md` says of each row what the plan says today."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.plan.models import LLAMA_8B, LLAMA_13B, LLAMA_70B, LORA, QWEN_7B
from trl.plan import Plan, Run, plan

TEXT = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
FAST = 1  # rows of the short suite

SFT = {"method": "sft", "rows": 2, "accumulation": 4, "prompt": 1, "completion": 2047}
DPO = {"method": "dpo", "rows": 2, "accumulation": 4, "prompt": 512, "completion": 1536, "has_reference": True}
GRPO = {"method": "grpo", "rows": 8, "prompt": 512, "completion": 512, "generations": 8}
PPO = {"method": "ppo", "rows": 8, "prompt": 64, "completion": 100, "generations": 1, "has_reference": True}
QLORA = {"adapter": LORA, "bits": 4, "nested": True}


class Row(NamedTuple):
    said: str  # what the guide names
    run: Run
    card: str  # that the guide names, or the smallest of its size

    def plan(self) -> Plan:
        return plan(self.run, self.card)


def run(config, **about):
    return Run(config, autocast=torch.bfloat16, **about)


ROWS = [
    Row("SFT, 8B, QLoRA: 8 GB", run(LLAMA_8B, **SFT, **QLORA), "rtx-3090"),
    Row("DPO, 8B, QLoRA: 8 GB", run(LLAMA_8B, **DPO, **QLORA), "rtx-3090"),
    Row("SFT, 8B, LoRA: RTX 4090", run(LLAMA_8B, **SFT, adapter=LORA), "rtx-4090"),
    Row("DPO, 8B, LoRA: 20 GB", run(LLAMA_8B, **DPO, adapter=LORA), "rtx-4090"),
    Row("DPO, 8B, LoRA, one pair at a time", run(LLAMA_8B, **{**DPO, "rows": 1, "accumulation": 8}, adapter=LORA),
        "rtx-4090"),
    Row("GRPO, 7B, LoRA: 24 GB", run(QWEN_7B, **GRPO, adapter=LORA, budget=2048), "rtx-3090"),
    Row("PPO, 8B, all weights: 80 GB", run(LLAMA_8B, **PPO), "a100-80"),
    Row("PPO, 8B, all weights: 2 A100", run(LLAMA_8B, **PPO, processes=2, sharding="fsdp2"), "a100-80"),
    Row("SFT, 7B, all weights: A100 40 GB", run(QWEN_7B, **SFT), "a100-40"),
    Row("SFT, 7B, all weights, 8-bit AdamW", run(QWEN_7B, **SFT, optim="adamw_8bit"), "a100-80"),
    Row("SFT, 7B, all weights: A100 80 GB", run(QWEN_7B, **SFT), "a100-80"),
    Row("DPO, 13B, all weights: A100 40 GB", run(LLAMA_13B, **DPO), "a100-40"),
    Row("DPO, 13B, LoRA: A100 40 GB", run(LLAMA_13B, **DPO, adapter=LORA), "a100-40"),
    Row("SFT, 70B, QLoRA: 48 GB", run(LLAMA_70B, **SFT, **QLORA), "rtx-a6000"),
    Row("DPO, 70B, LoRA: 80 GB", run(LLAMA_70B, **DPO, adapter=LORA), "a100-80"),
    Row("DPO, 70B, QLoRA", run(LLAMA_70B, **DPO, **QLORA), "a100-80"),
]  # fmt: skip
# Tokens per second, batches of 4 rows of 2048 tokens, at 35 % of the card's speed.
SPEEDS = [
    ("QLoRA on an RTX 3090: 1,100", run(LLAMA_8B, **{**SFT, "rows": 4, "accumulation": 1}, **QLORA), "rtx-3090"),
    ("QLoRA on an RTX 4090: 1,450", run(LLAMA_8B, **{**SFT, "rows": 4, "accumulation": 1}, **QLORA), "rtx-4090"),
    ("bf16, all weights, on an A100 80 GB: 2,800", run(LLAMA_8B, **{**SFT, "rows": 4, "accumulation": 1}), "a100-80"),
]


def cells(row: Row) -> str:
    """The plan's columns of the table in the documentation."""
    found = row.plan()
    spare = found.card.memory - found.peak.total / 2**30
    return f"{found.peak.total / 2**30:.1f} | {found.peak.name} | {row.card}: {spare:+.1f}"


def tokens_per_second(run: Run, card: str) -> int:
    return round(run.tokens_of_step / plan(run, card).seconds_of_step()[0])


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (place >= FAST)) for place, row in enumerate(ROWS)]
)
def test_a_row_of_the_guide(row: Row):
    assert f"| {row.said} | {cells(row)} |" in TEXT


@pytest.mark.slow
@pytest.mark.parametrize(("said", "run", "card"), SPEEDS)
def test_a_speed_of_the_guide(said: str, run, card: str):
    assert f"| {said} | {tokens_per_second(run, card):,} |" in TEXT
