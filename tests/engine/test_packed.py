"""Packed rows give the log-probs and gradients of the rows alone, on every family."""

import pytest
import torch
from datasets import Dataset

from tests.engine import families
from trl.data.batching.collate import sequences
from trl.data.batching.packing import packed
from trl.engine.probe import attach
from trl.engine.score import score


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = (13, 4, 22, 9, 2, 17)
    ids = [torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    masks = [[index % 3 != 1 for index in range(length)] for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "loss_mask": masks, "row": list(range(len(lengths)))})


@pytest.mark.parametrize("name", [*families.FLAT, *families.REFUSED])
def test_packed_equals_unpacked(name):
    model = families.build(name)
    attachment = attach(model)
    alone = rows()
    together, report = packed(alone, 32, "bfd", seed=1)
    assert report.packed_rows < len(alone)
    found = []
    for data in (alone, together):
        batch = attachment.batch(sequences([data[index] for index in range(len(data))]))
        model.zero_grad()
        stats = score(model, batch)
        stats.logp_N.sum().backward()
        by_row = {int(batch["row_S"][number]): stats.logp_N[stats.seq_N == number].detach() for number in range(6)}
        found.append((by_row, families.gradients(model)))
    (apart, expected), (inside, gradient) = found
    for row, logp_N in apart.items():
        torch.testing.assert_close(inside[row], logp_N, atol=1e-5, rtol=1e-5)
    for parameter, value in expected.items():
        scale = max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(gradient[parameter], value, atol=1e-5 * scale, rtol=1e-5, msg=parameter)
