"""What is drawn at once and trained on in some steps: a round of whole groups, in plain values.

A group is the completions of one prompt, `G` of them. Every rank holds the whole round, so that what a step trains on
depends neither on how many ranks there are nor on who drew it, and so that a checkpoint has all of it.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl.data.batches import RowBatches
from trl.data.collate import Branch, Tree

from .types import Completion


class Drawn(NamedTuple):
    """A completion, and what was said of it."""

    row: int
    prompt: Any
    prompt_ids: list[int]
    completion: Completion
    text: str
    rewards: list[float]  # by each function; NaN where one does not apply
    ref_logps: list[float] | None
    old_logps: list[float] | None
    extra: dict[str, Any]  # what the functions want to see beside it


class Sample(NamedTuple):
    """One completion, ready to be trained on."""

    row: int
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]  # of the policy that drew it
    advantage: float
    ref_logps: list[float] | None  # of the reference
    trained: bool  # False: it was cut, and cut completions are not trained on
    old_logps: list[float] | None = None  # of the policy that drew it, by the trainer, where the sampler's are others


class Arithmetic(NamedTuple):
    """How many of what."""

    step: int  # completions an optimizer step, on all devices
    round: int  # completions drawn at once, on all devices
    prompts: int  # prompts of a round
    parts: int  # optimizer steps that a round is cut into


def arithmetic(args: Any, accumulation: int) -> Arithmetic:
    """Rounds of whole groups and of whole steps, whatever the batch size and the number of generations."""
    step = args.train_batch_size * accumulation * args.world_size
    wanted = step
    if args.generation_batch_size is not None:
        wanted = args.generation_batch_size
    elif args.steps_per_generation is not None:
        wanted = args.train_batch_size * args.steps_per_generation * args.world_size
    least = math.lcm(step, args.num_generations)
    together = math.ceil(wanted / least) * least
    return Arithmetic(step, together, together // args.num_generations, together // step)


class Tickets:
    """A batch sampler: for each round its prompts, and nothing for the steps that follow on the same round."""

    def __init__(self, rounds: RowBatches, steps: int) -> None:
        self.rounds, self.steps = rounds, steps

    def __len__(self) -> int:
        return len(self.rounds) * self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for prompts in self.rounds:
            yield prompts
            for _ in range(self.steps - 1):
                yield []

    def set_epoch(self, epoch: int) -> None:
        self.rounds.set_epoch(epoch)

    @property
    def batch_sampler(self) -> "Tickets":
        return self


class Further:
    """Prompts beyond those of the round, to draw again where a group teaches nothing: all rows in an order of their
    own, again and again. `taken` says how far that is."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.taken = rows, seed, 0

    def take(self, count: int, drawn: set[int]) -> list[int]:
        """So many rows that are not `drawn` in this round yet, or fewer where there are no others."""
        found: list[int] = []
        for _ in range(self.rows):
            if len(found) == count:
                break
            turn, place = divmod(self.taken, self.rows)
            row = int(np.random.default_rng([self.seed, turn, 1]).permutation(self.rows)[place])
            self.taken += 1
            if row not in drawn and row not in found:
                found.append(row)
        return found


class Replay:
    """The groups of the last rounds that teach something, `size` of them at most: the newest."""

    def __init__(self, size: int, seed: int) -> None:
        self.seed, self.groups = seed, deque[list[Sample]](maxlen=size)

    def replace(self, groups: list[list[Sample]], number: int) -> tuple[list[list[Sample]], int]:
        """Round `number` with groups from here in place of those without any advantage, and how many. What it has of
        its own is kept here for later rounds."""
        dull = [place for place, group in enumerate(groups) if not teaches(group)]
        new = [group for group in groups if teaches(group)]
        generator = np.random.default_rng([self.seed, number, 2])
        chosen = generator.permutation(len(self.groups))[: len(dull)].tolist()
        groups = list(groups)
        for place, index in zip(dull, chosen, strict=False):
            groups[place] = self.groups[index]
        self.groups.extend(new)
        return groups, len(chosen)


def teaches(group: Iterable[Sample]) -> bool:
    return any(sample.advantage != 0.0 for sample in group)


def grouped(samples: Sequence[Any], generations: int) -> list[list[Any]]:
    return [list(samples[start : start + generations]) for start in range(0, len(samples), generations)]


def split(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Parts of as many samples each."""
    bounds = np.linspace(0, len(samples), parts + 1).round().astype(int)
    return [list(samples[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def share(samples: Sequence[Sample], ranks: int, rank: int) -> list[Sample]:
    """What of a step is this rank's: about as many tokens as any other's."""
    ends = np.cumsum([len(each.ids) for each in samples]) if samples else np.zeros(1)
    bounds = np.searchsorted(ends, ends[-1] * np.arange(1, ranks) / ranks, side="left") + 1
    edges = [0, *np.minimum(bounds, len(samples)).tolist(), len(samples)]
    return list(samples[edges[rank] : edges[rank + 1]])


def trees(samples: Sequence[Sample]) -> list[Tree]:
    """One tree for each run of samples of one prompt. One that is not trained on is a branch without trained tokens."""
    found: list[Tree] = []
    prompt: list[int] | None = None
    for sample in samples:
        branch = Branch(sample.ids, [sample.trained] * len(sample.ids), sample.row)
        if found and sample.prompt_ids == prompt:
            found[-1] = found[-1]._replace(branches=(*found[-1].branches, branch))
        else:
            prompt = sample.prompt_ids
            found.append(Tree(Branch(prompt, [False] * len(prompt)), (branch,), sample.row))
    return found


def judgement(judged: Sequence[tuple[float, list[float]]], threshold: float) -> dict[str, float]:
    """The mean reward over prompts with half the width of its 95 % interval, and pass@k: the chance that one of k
    completions passes, without bias (Chen et al. 2021, arXiv:2107.03374, equation 1)."""
    means = np.array([mean for mean, _ in judged], dtype=np.float64)
    means = means[np.isfinite(means)]
    if not len(means):
        return {}
    spread = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    found = {"reward": float(means.mean()), "reward_ci95": float(1.96 * spread)}
    drawn = min(len(rewards) for _, rewards in judged)
    for k in sorted({1, drawn}):
        chances = []
        for _, rewards in judged:
            count, passed = len(rewards), sum(reward >= threshold for reward in rewards)
            chances.append(1.0 - math.comb(count - passed, k) / math.comb(count, k))
        found[f"pass@{k}"] = float(np.mean(chances))
    return found
