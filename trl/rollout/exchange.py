"""A round among ranks, and a round in a checkpoint.

The numbers of every trace go to all ranks; its columns go once to the rank that trains on it. In a checkpoint the first
rank writes the numbers, and every rank the columns that it holds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

from trl.rollout.traces import COLUMNS, Columns, TrainingTrace

Steps = list[list[TrainingTrace]]


def gathered(numbers: np.ndarray, shares: Sequence[int], device: torch.device) -> np.ndarray:
    """The rows of all ranks, [own, X] -> [all, X], fp32; `shares` says how many rows each rank has."""
    longest = max(shares)
    mine = torch.zeros(longest, numbers.shape[1], device=device)
    mine[: len(numbers)] = torch.from_numpy(numbers.astype(np.float32)).to(device)
    every = [torch.empty_like(mine) for _ in shares]
    distributed.all_gather(every, mine)
    return torch.cat([part[:count] for part, count in zip(every, shares, strict=True)]).cpu().numpy()


def anyone(here: bool, device: torch.device) -> bool:
    """Whether it is true on this rank or on another."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return here
    flag = torch.tensor(int(here), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)


def delivered(
    traces: Sequence[TrainingTrace], holders: Sequence[int], names: Sequence[str], device: torch.device
) -> list[TrainingTrace]:
    """The traces with their tokens on the ranks `holders`, by one exchange; a holder of -1 needs none. `names` says
    which columns there are."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    outgoing: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    incoming: list[list[int]] = [[] for _ in range(ranks)]
    found = [trace._replace(holder=holder, columns=None) for trace, holder in zip(traces, holders, strict=True)]
    for place, (trace, holder) in enumerate(zip(traces, holders, strict=True)):
        if trace.holder == rank and holder >= 0:
            assert trace.columns is not None
            outgoing[holder].append(_words(trace.columns, names))
        if holder == rank:
            incoming[trace.holder].append(place)
    sizes = [sum(found[place].length for place in places) * len(names) for places in incoming]
    sent = _joined(words for parts in outgoing for words in parts)
    received = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    distributed.all_to_all_single(
        received, torch.from_numpy(sent).to(device), sizes, [sum(map(len, parts)) for parts in outgoing]
    )
    words, start = received.cpu().numpy(), 0
    for place in (place for places in incoming for place in places):
        end = start + found[place].length * len(names)
        found[place] = found[place]._replace(columns=_columns(words[start:end], names))
        start = end
    return found


def _words(columns: Columns, names: Sequence[str]) -> np.ndarray:
    """All of a trace's columns as int32, one after the other."""
    parts = [np.asarray(columns[name]) for name in names]
    return np.concatenate([part.astype(np.int32) if part.dtype == bool else part.view(np.int32) for part in parts])


def _columns(words: np.ndarray, names: Sequence[str]) -> Columns:
    found = dict(zip(names, words.copy().reshape(len(names), -1), strict=True))
    return {name: row.astype(bool) if COLUMNS[name] is np.bool_ else row.view(COLUMNS[name])
            for name, row in found.items()}  # fmt: skip


# --- in a checkpoint ------------------------------------------------------------------------------------------------


def packed(steps: Iterable[Sequence[TrainingTrace]]) -> dict[str, Any]:
    """All of the steps but the tokens, as tensors and numbers. A step that comes again is written once."""
    steps = list(steps)
    distinct = _distinct(steps)
    traces = [trace for step in distinct for trace in step]
    places = {id(step): place for place, step in enumerate(distinct)}
    prompts = _distinct([trace.prompt_ids for trace in traces])
    numbers = {id(prompt): place for place, prompt in enumerate(prompts)}
    table = [
        (trace.row, numbers[id(trace.prompt_ids)], trace.length, trace.trained, trace.holder, trace.version)
        for trace in traces
    ]
    return {
        "order": [places[id(step)] for step in steps],
        "sizes": [len(step) for step in distinct],
        "table": torch.tensor(table, dtype=torch.int64).view(-1, 6),
        "advantages": torch.tensor([trace.advantage for trace in traces], dtype=torch.float64),
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "prompts": torch.from_numpy(_joined(prompts)),
    }


def packed_tokens(steps: Iterable[Sequence[TrainingTrace]], rank: int) -> dict[str, Any]:
    """The tokens of the steps that this rank holds."""
    held = [trace.columns for step in _distinct(steps) for trace in step if trace.holder == rank]
    tokens = [each for each in held if each is not None]
    names = [name for name in COLUMNS if tokens and name in tokens[0]]
    return {"names": names, "words": torch.from_numpy(_joined([_words(each, names) for each in tokens]))}


def unpacked(whole: dict[str, Any], parts: Mapping[int, dict[str, Any]]) -> Steps:
    """The steps of `packed`, with the tokens of those holders whose `packed_tokens` are in `parts`."""
    prompts = np.split(whole["prompts"].numpy().copy(), np.cumsum(whole["prompt_lengths"])[:-1])
    starts = dict.fromkeys(parts, 0)
    traces: list[TrainingTrace] = []
    for (row, prompt, length, trained, holder, version), advantage in zip(
        whole["table"].tolist(), whole["advantages"].tolist(), strict=True
    ):
        columns = None
        if holder in parts:
            names, start = parts[holder]["names"], starts[holder]
            starts[holder] = start + length * len(names)
            columns = _columns(parts[holder]["words"][start : starts[holder]].numpy(), names)
        traces.append(TrainingTrace(row, prompts[prompt], length, advantage, trained, columns, holder, version))
    bounds = np.cumsum([0, *whole["sizes"]]).tolist()
    distinct = [traces[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    return [distinct[place] for place in whole["order"]]


def rehomed(steps: Steps, deal: Callable[[Sequence[TrainingTrace]], list[int]], rank: int) -> Steps:
    """Steps whose tokens are all here, with the holders that `deal` names for each step; this rank keeps its own."""
    found = {
        id(step): [
            trace._replace(holder=holder, columns=trace.columns if holder == rank else None)
            for trace, holder in zip(step, deal(step), strict=True)
        ]
        for step in _distinct(steps)
    }
    return [found[id(step)] for step in steps]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _joined(parts: Iterable[Any]) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype=np.int32)]).astype(np.int32)
