"""Rounds on four gloo processes, some of which draw nothing: numbers of one process, and checkpoints within a round."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.distributed import rounds_worker
from tests.distributed.launcher import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def check(ours, theirs, what):
    assert len(ours) == len(theirs) > 0, what
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys(), what
        for name, value in expected.items():
            if name.startswith("eval_") and name.endswith("std"):
                continue  # the mean over batches of their deviations
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (what, expected["step"], name)


def table(path):
    """The first round as it is written for reading by eye."""
    lines = (path / "completions" / "completions_00000.jsonl").read_text().splitlines()
    return [(row["prompt"], row["completion"], row["reward"]) for row in map(json.loads, lines)]


def steps(lines):
    """Without the summary at the end, which is of the steps of one call."""
    return [line for line in lines if "train_loss" not in line]


def test_four_ranks_share_rounds_of_one_process(tmp_path, small_path):
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    alone = {}
    for method, prompts in rounds_worker.CASES:
        name = f"{method}-{prompts}"
        run = rounds_worker.make(tmp_path / f"alone-{name}", tokenizer, method, prompts, 1)
        run.train()
        alone[name] = rounds_worker.lines(run)
    launch(rounds_worker, tmp_path, small_path, ranks=4, timeout=900)
    for name, expected in alone.items():
        whole, resumed = json.loads((tmp_path / f"{name}.json").read_text())
        check(whole, expected, name)
        # Resumed by as many ranks it is the uninterrupted run but for rounding: DDP adds gradients up in another order
        # in its first step.
        check(steps(resumed), steps(whole), name)
        assert table(tmp_path / f"ranks-{name}") == table(tmp_path / f"alone-{name}")
    other = json.loads((tmp_path / "other.json").read_text())
    check(*([line for line in steps(each) if line["step"] > 3] for each in (other, alone["RLOO-3"])), "other")
    # The round is in the checkpoint once: its numbers with the first rank, the tokens with their holders.
    states = [
        torch.load(tmp_path / "ranks-RLOO-3" / "checkpoint-3" / f"trl_state_{rank}.pt", weights_only=True)["method"]
        for rank in range(4)
    ]
    assert ["round" in state for state in states] == [True, False, False, False]
    numbers = states[0]["round"]["table"]
    lengths = numbers[numbers[:, 4] >= 0, 2].sum()  # of those that a rank holds
    assert len(states[0]["round"]["sizes"]) == 1 and lengths > 0
    assert sum(len(state["round_tokens"]["words"]) for state in states) == 3 * lengths
