"""Memory runs out on one of two gloo processes: both take the step again, and its gradient is that of one process."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.distributed import budget_worker as worker
from tests.distributed.launcher import launch
from tests.distributed.test_two_processes import assert_same
from tests.trainer.helpers import first_gradient

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_both_take_the_step_again(tmp_path, small_path):
    launch(worker, tmp_path, small_path, timeout=150)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for name, tokens in worker.CASES.items():
        alone = worker.make(name, tmp_path / "alone", tokenizer, 1)
        expected, line = first_gradient(alone), alone.state.log_history[0]
        for late in (False, True):
            found = [json.loads((tmp_path / f"{name}-{late}-{rank}.json").read_text()) for rank in range(2)]
            assert found[0][0] == 0 < found[1][0], name
            assert found[0][1] == found[1][1] < 10**5, name
            assert found[1][2] > tokens, name
            for rank in range(2):
                assert_same(torch.load(tmp_path / f"{name}-{late}-{rank}.pt"), expected, f"{name} {late} {rank}")
            for metric in line.keys() - {"grad_norm", "total_flos", "step_time"}:
                assert found[0][3][metric] == pytest.approx(line[metric], rel=1e-5, abs=1e-5), (name, metric)
    for rank in range(2):
        assert "max_tokens_per_micro_batch cuts micro-batches" in (tmp_path / f"refused {rank}.txt").read_text()
