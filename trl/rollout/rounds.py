"""What is drawn at once and trained on in some steps: a round of whole groups.

A group is the completions of one prompt, `G` of them. Every rank knows the prompt, the length and the advantage of
every completion, so that what a step trains on depends neither on the number of ranks nor on the rank that drew it. The
tokens of a completion are on one rank alone, its holder: first the rank that drew it, then the one that trains on it.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl.data.batching.batches import RowBatches, StreamBatches
from trl.data.batching.collate import Branch, Tree

# Of the mean of tokens, what a rank may get before a group is halved: each is tried, and the best deal taken.
SLACKS = (1.1, 1.05, 1.02, 1.0)


class Tokens(NamedTuple):
    """The tokens of a completion, an int32 array, and their log-probs, fp32 arrays of the same length."""

    ids: Any
    logps: Any  # of the policy that drew it, by the sampler
    ref_logps: Any = None  # of the reference
    old_logps: Any = None  # of the policy that drew it, by the trainer, where the sampler's are others


class ScoredTrace(NamedTuple):
    """A completion and its rewards. What its holder alone has is None elsewhere."""

    row: int
    prompt_ids: Any  # an int32 array, one for all completions of the prompt
    length: int
    finished: bool
    rewards: list[float]  # by each function; NaN where one does not apply
    kl: float  # divergence from the reference, as its own tokens estimate it; 0 where nobody asks
    holder: int
    tokens: Tokens | None
    shown: dict[str, Any] | None = None  # what the table of completions shows of it, where it is written


class TrainingTrace(NamedTuple):
    """One completion, ready to be trained on. What its holder alone has is None elsewhere."""

    row: int
    prompt_ids: Any  # one array for all completions of the prompt
    length: int
    advantage: float
    trained: bool  # False: it was cut, and cut completions are not trained on
    tokens: Tokens | None
    holder: int = 0


class RoundSizes(NamedTuple):
    """Sizes of a round."""

    step: int  # completions an optimizer step, on all devices
    round: int  # completions drawn at once, on all devices
    prompts: int  # prompts of a round
    parts: int  # optimizer steps that a round is cut into


def round_sizes(args: Any, accumulation: int) -> RoundSizes:
    """Rounds of whole groups and of whole steps, whatever the batch size and the number of generations."""
    step = args.train_batch_size * accumulation * args.world_size
    wanted = step
    if args.generation_batch_size is not None:
        wanted = args.generation_batch_size
    elif args.steps_per_generation is not None:
        wanted = args.train_batch_size * args.steps_per_generation * args.world_size
    least = math.lcm(step, args.num_generations)
    together = math.ceil(wanted / least) * least
    return RoundSizes(step, together, together // args.num_generations, together // step)


class StepSampler:
    """A batch sampler: for each round its prompts, and nothing for the steps that follow on the same round."""

    def __init__(self, rounds: RowBatches | StreamBatches, steps: int) -> None:
        self.rounds, self.steps = rounds, steps

    def __len__(self) -> int:
        assert isinstance(self.rounds, RowBatches)
        return len(self.rounds) * self.steps

    def __iter__(self) -> Iterator[list[Any]]:
        for prompts in self.rounds:
            yield prompts
            for _ in range(self.steps - 1):
                yield []

    def set_epoch(self, epoch: int) -> None:
        self.rounds.set_epoch(epoch)

    @property
    def batch_sampler(self) -> "StepSampler":
        return self


class RefillPrompts:
    """Further prompts in place of groups without any advantage: all rows in a seeded order, again and again. `position`
    is the place in it."""

    def __init__(self, rows: int, seed: int, position: int = 0) -> None:
        self.rows, self.seed, self.position = rows, seed, position
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, dtype=int)

    def take(self, count: int, drawn: set[int]) -> list[int]:
        """`count` rows that are not `drawn` in this round yet, or fewer where there are no others."""
        found: list[int] = []
        taken = set(drawn)
        for _ in range(self.rows):
            if len(found) == count:
                break
            row = self._row()
            self.position += 1
            if row not in taken:
                found.append(row)
                taken.add(row)
        return found

    def _row(self) -> int:
        turn, place = divmod(self.position, self.rows)
        if self._order[0] != turn:
            self._order = turn, np.random.default_rng([self.seed, turn, 1]).permutation(self.rows)
        return int(self._order[1][place])


class Replay:
    """The groups of the last rounds that teach something, `size` of them at most: the newest."""

    def __init__(self, size: int, seed: int) -> None:
        self.seed, self.groups = seed, deque[list[TrainingTrace]](maxlen=size)

    def replace(self, groups: list[list[TrainingTrace]], number: int) -> tuple[list[list[TrainingTrace]], int]:
        """Round `number` with groups from here in place of those without any advantage, and how many. What it has of
        its own is kept here for later rounds."""
        dull = [place for place, group in enumerate(groups) if not has_signal(group)]
        new = [group for group in groups if has_signal(group)]
        generator = np.random.default_rng([self.seed, number, 2])
        chosen = generator.permutation(len(self.groups))[: len(dull)].tolist()
        groups = list(groups)
        for place, index in zip(dull, chosen, strict=False):
            groups[place] = self.groups[index]
        self.groups.extend(new)
        return groups, len(chosen)


def has_signal(group: Iterable[TrainingTrace]) -> bool:
    return any(sample.advantage != 0.0 for sample in group)


def grouped(samples: Sequence[Any], generations: int) -> list[list[Any]]:
    return [list(samples[start : start + generations]) for start in range(0, len(samples), generations)]


def split_into_steps(samples: Sequence[TrainingTrace], parts: int) -> list[list[TrainingTrace]]:
    """Parts of as many samples each."""
    bounds = np.linspace(0, len(samples), parts + 1).round().astype(int)
    return [list(samples[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def same_prompt(one: TrainingTrace, other: TrainingTrace) -> bool:
    return one.prompt_ids is other.prompt_ids or np.array_equal(one.prompt_ids, other.prompt_ids)


def deal(samples: Sequence[TrainingTrace], ranks: int) -> list[int]:
    """The rank that trains on each sample: about as many tokens for any rank as for any other.

    Runs of one prompt are dealt out longest first, each to the rank with the fewest tokens so far. A run that is too
    long for that rank is halved, and its prompt is then computed on both.
    """
    if ranks == 1:
        return [0] * len(samples)
    runs: list[list[int]] = []
    for place, sample in enumerate(samples):
        if not runs or not same_prompt(samples[runs[-1][-1]], sample):
            runs.append([])
        runs[-1].append(place)

    _, holders = min((_dealt(runs, samples, ranks, slack) for slack in SLACKS), key=lambda found: found[0])
    return holders


def _dealt(runs: list[list[int]], samples: Sequence[TrainingTrace], ranks: int, slack: float) -> tuple[int, list[int]]:
    """The tokens of the rank that has most, and the rank of each sample."""

    def cost(run: list[int]) -> int:
        return sum(samples[place].length for place in run) + len(samples[run[0]].prompt_ids)

    holders = [0] * len(samples)
    waiting = [(-cost(run), run) for run in runs]
    limit = -slack * sum(negative for negative, _ in waiting) / ranks
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


def trees(samples: Sequence[TrainingTrace]) -> list[Tree]:
    """One tree for each run of samples of one prompt. One that is not trained on is a branch without trained tokens."""
    found: list[Tree] = []
    before: TrainingTrace | None = None
    for sample in samples:
        assert sample.tokens is not None
        branch = Branch(sample.tokens.ids, [sample.trained] * sample.length, sample.row)
        if before is not None and same_prompt(before, sample):
            found[-1] = found[-1]._replace(branches=(*found[-1].branches, branch))
        else:
            root = Branch(sample.prompt_ids, [False] * len(sample.prompt_ids))
            found.append(Tree(root, (branch,), sample.row))
        before = sample
    return found


def evaluation_metrics(judged: Sequence[tuple[float, list[float]]], threshold: float) -> dict[str, float]:
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
