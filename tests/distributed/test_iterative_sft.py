"""Iterative SFT on two gloo processes, one with fewer texts or none: the steps of one process on all texts."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.distributed import iterative_worker as worker
from tests.distributed.launcher import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes_equal_one(tmp_path, small_path):
    launch(worker, tmp_path, small_path, timeout=300)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for case in worker.CASES:
        alone = worker.make(tmp_path / "alone", tokenizer, case, per_device_train_batch_size=7)
        expected, weights = worker.two_steps(alone, worker.TEXTS)
        # Sums in bfloat16 depend on their order.
        near = {"rel": 1e-2} if "bf16" in case else {"rel": 1e-4}
        for name in worker.SHARES:
            (ours, log), (theirs, _) = (
                json.loads((tmp_path / f"{name} {case} {rank}.json").read_text()) for rank in range(2)
            )
            assert ours == theirs, (name, case)
            for mine, whole in zip(ours, expected, strict=True):
                assert mine == {key: pytest.approx(value, **near) for key, value in whole.items()}, (name, case)
            for line, whole in zip(log, alone.state.log_history, strict=True):
                for metric in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
                    assert line[metric] == pytest.approx(whole[metric], **near), (name, case, metric)
            found = torch.load(tmp_path / f"{name} {case}.pt")
            assert found.keys() == weights.keys()
            if "bf16" not in case:
                for parameter, weight in weights.items():
                    # Adam makes a step of full size of the smallest gradient.
                    assert (found[parameter] - weight).norm() <= 1e-2 * weight.norm(), (name, case, parameter)
    for rank in range(2):
        assert (tmp_path / f"refused {rank}.txt").read_text() == "texts 1 is a int: texts are strings"
