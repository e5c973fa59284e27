"""Traces to micro-batches: which rank trains on which trace, what a forward pass holds, and what the loss reads."""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.rollout.traces import TrainingTrace, same_prompt, token_mask

# Of the mean of tokens, what a rank may get before a group is halved: each is tried, and the best deal taken.
SLACKS = (1.1, 1.05, 1.02, 1.0)
# Tokens of a forward pass. On a CPU the time of a step is flat from here on (within a tenth), and memory is not.
BUDGET = {"cpu": 1024, "default": 16384}


def deal(samples: Sequence[TrainingTrace], ranks: int, together: int = 1) -> list[int]:
    """The rank that trains on each sample: about as many tokens for any rank as for any other.

    Runs of one prompt are dealt out longest first, each to the rank with the fewest tokens so far. A run that is too
    long for that rank is halved, and its prompt is then computed on both. So it is with runs of `together` samples, if
    a loss reads them together, but these are never halved.
    """
    if ranks == 1:
        return [0] * len(samples)
    if together > 1:
        runs = [list(range(start, start + together)) for start in range(0, len(samples), together)]
        return _dealt(runs, samples, ranks, None)[1]
    runs = []
    for place, sample in enumerate(samples):
        if not runs or not same_prompt(samples[runs[-1][-1]], sample):
            runs.append([])
        runs[-1].append(place)

    _, holders = min((_dealt(runs, samples, ranks, slack) for slack in SLACKS), key=lambda found: found[0])
    return holders


def _dealt(
    runs: list[list[int]], samples: Sequence[TrainingTrace], ranks: int, slack: float | None
) -> tuple[int, list[int]]:
    """The tokens of the rank that has most, and the rank of each sample. No run is halved if `slack` is None."""

    def cost(run: list[int]) -> int:
        return sum(samples[place].length for place in run) + len(samples[run[0]].prompt_ids)

    holders = [0] * len(samples)
    waiting = [(-cost(run), run) for run in runs]
    limit = math.inf if slack is None else -slack * sum(negative for negative, _ in waiting) / ranks
    loads = [(0, rank) for rank in range(ranks)]
    heapq.heapify(waiting)
    while waiting:
        negative, run = heapq.heappop(waiting)
        load, rank = loads[0]
        if len(run) > 1 and load - negative > limit:
            for half in _halves(run, samples):
                heapq.heappush(waiting, (-cost(half), half))
            continue
        heapq.heapreplace(loads, (load - negative, rank))
        for place in run:
            holders[place] = rank
    return max(load for load, _ in loads), holders


def _halves(run: list[int], samples: Sequence[TrainingTrace]) -> tuple[list[int], list[int]]:
    """A run in two of about as many tokens each."""
    halves: tuple[list[int], list[int]] = [], []
    lengths = [0, 0]
    for place in sorted(run, key=lambda each: -samples[each].length):
        shorter = int(lengths[1] < lengths[0])
        halves[shorter].append(place)
        lengths[shorter] += max(samples[place].length, 1)
    return sorted(halves[0]), sorted(halves[1])


def micro_batches(
    traces: Sequence[TrainingTrace], budget: int | None, share_prompt: bool, device: torch.device, together: int = 1
) -> list[list[TrainingTrace]]:
    """The traces in their order, cut so that a forward pass has at most `budget` tokens (or `together` traces, which
    are never cut apart).

    The budget is that of the device if it is None. With `share_prompt` a prompt counts once for a run of its traces.
    """
    if budget is None:
        budget = BUDGET.get(device.type, BUDGET["default"])
    groups: list[list[TrainingTrace]] = []
    used = 0
    for start in range(0, len(traces), together):
        part = traces[start : start + together]
        lengths = sum(trace.length for trace in part)
        prompts = len(part[0].prompt_ids) * (1 if share_prompt else len(part))
        shares = bool(groups) and share_prompt and same_prompt(groups[-1][-1], part[0])
        cost = lengths + (0 if shares else prompts)
        if not groups or used + cost > budget:
            groups.append([])
            used, cost = 0, lengths + prompts
        groups[-1] += part
        used += cost
    return groups


def equally_many(groups: list[list[Any]], ranks: int, device: torch.device) -> list[list[Any]]:
    """As many groups on every rank, empty ones added: ranks gather sharded weights together."""
    if ranks > 1:
        most = torch.tensor(len(groups), device=device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        groups = groups + [[] for _ in range(int(most) - len(groups))]
    return groups


def columns_of_tokens(traces: Sequence[TrainingTrace], names: Sequence[str]) -> dict[str, Tensor]:
    """What a loss reads of each trained token, fp32, [N] each, by the names of a batch: `advantage_N`,
    `sampler_logp_N`, `old_logp_N` (the sampler's where the engine's were not taken), and the others of `names`."""
    kept = [(trace, token_mask(trace)) for trace in traces if trace.trained]
    found = {}
    for name in dict.fromkeys(["advantages", "logps", "old_logps", *names]):
        if name not in _IN_A_BATCH:
            continue
        parts = [np.asarray(_column(trace, name), dtype=np.float32)[mask] for trace, mask in kept]
        found[_IN_A_BATCH[name]] = torch.from_numpy(np.concatenate([*parts, np.zeros(0, dtype=np.float32)]))
    return found


_IN_A_BATCH = {
    "logps": "sampler_logp_N",
    "old_logps": "old_logp_N",
    "ref_logps": "ref_logp_N",
    "advantages": "advantage_N",
    "values": "old_value_N",
    "returns": "return_N",
}


def _column(trace: TrainingTrace, name: str) -> np.ndarray:
    assert trace.columns is not None
    if name in trace.columns:
        return trace.columns[name]
    return np.full(trace.length, trace.advantage) if name == "advantages" else trace.columns["logps"]
