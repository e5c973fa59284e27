"""Metrics of one process between two log lines. Several processes: tests/distributed."""

import pytest
import torch

from trl.losses.tokens import Metric, largest, mean_metric, smallest
from trl.trainer.metrics import Totals, gather_rows

CPU = torch.device("cpu")


def test_means_add_up_and_ends_do_not():
    totals = Totals()
    totals.add({"a": mean_metric(torch.tensor([1.0, 2.0])), "low": smallest(torch.tensor([3.0, 4.0]))})
    totals.add({"none": mean_metric(torch.zeros(0))})
    totals.add(
        {"a": mean_metric(torch.tensor([6.0])), "low": smallest(torch.zeros(0)), "high": largest(torch.tensor([-5.0]))}
    )
    assert totals.reduced(CPU, 1, tokens=7) == ({"a": 3.0, "high": -5.0, "low": 3.0}, {"tokens": 7.0})
    assert totals.reduced(CPU, 1) == ({}, {})
    totals.add({"high": largest(torch.tensor([1.0]))})
    assert totals.reduced(CPU, 1) == ({"high": 1.0}, {})


def test_what_a_checkpoint_keeps_goes_on():
    first, second = Totals(), Totals()
    first.add({"a": mean_metric(torch.tensor([1.0, 2.0])), "low": smallest(torch.tensor([3.0]))})
    second.load(first.state(), CPU)
    second.add({"a": mean_metric(torch.tensor([6.0])), "low": smallest(torch.tensor([2.0]))})
    assert second.reduced(CPU, 1)[0] == {"a": 3.0, "low": 2.0}
    older = Totals()
    older.load({"a": (torch.tensor(3.0), 2.0)}, CPU)  # as checkpoints were before there were kinds
    assert older.reduced(CPU, 1)[0] == {"a": 1.5}


def test_a_metric_has_one_kind():
    totals = Totals()
    totals.add({"a": Metric(torch.tensor(1.0), 1.0)})
    with pytest.raises(ValueError, match="the metric a is given as max and as mean: give it one kind"):
        totals.add({"a": largest(torch.ones(1))})


def test_rows_of_one_process_stay_as_they_are():
    values = {"ids": torch.arange(6).view(3, 2), "more": (torch.zeros(0, 2, dtype=torch.bool),)}
    found = gather_rows(values)
    assert torch.equal(found["ids"], values["ids"]) and found["more"][0].shape == (0, 2)
    assert found["more"][0].dtype == torch.bool
