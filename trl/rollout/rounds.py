"""Rounds: how large they are, in which order prompts come, and what replaces groups without a signal.

A round is sampled by one policy and trained on in one or more optimizer steps. It is made of whole groups; a group is
the traces of one prompt.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl.data.batching.batches import RowBatches, StreamBatches
from trl.rollout.traces import TrainingTrace, has_signal


class RoundSizes(NamedTuple):
    """Sizes of a round."""

    step: int  # completions an optimizer step, on all devices
    round: int  # completions sampled at once, on all devices
    prompts: int  # prompts of a round
    parts: int  # optimizer steps that a round is cut into


def round_sizes(args: Any, accumulation: int, completions: int = 1) -> RoundSizes:
    """Rounds of whole groups and of whole steps, whatever the batch size and the number of generations. A row of the
    batch size is `completions` of them."""
    step = args.train_batch_size * accumulation * args.world_size * completions
    wanted = step
    if args.generation_batch_size is not None:
        wanted = args.generation_batch_size
    elif args.steps_per_generation is not None:
        wanted = args.train_batch_size * args.steps_per_generation * args.world_size * completions
    least = math.lcm(step, args.num_generations)
    together = math.ceil(wanted / least) * least
    return RoundSizes(step, together, together // args.num_generations, together // step)


class StepSampler:
    """A batch sampler of placeholders: a round's prompts for its first step, an empty list for each further step."""

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
    """Extra prompts that replace groups without a signal, in a seeded order that cycles, from `position` on."""

    def __init__(self, rows: int, seed: int, position: int = 0) -> None:
        self.rows, self.seed, self.position = rows, seed, position
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, dtype=int)

    def take(self, count: int, sampled: set[int]) -> list[int]:
        """The next `count` rows that are not in `sampled`, or fewer if there are no others."""
        found: list[int] = []
        taken = set(sampled)
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
    """A buffer of the newest groups that have a signal, at most `size` of them."""

    def __init__(self, size: int, seed: int) -> None:
        self.seed, self.groups = seed, deque[list[TrainingTrace]](maxlen=size)

    def replace(self, groups: list[list[TrainingTrace]], number: int) -> tuple[list[list[TrainingTrace]], int]:
        """Round `number` with groups of the buffer in place of those without a signal, and how many were replaced. The
        round's own groups with a signal enter the buffer."""
        idle = [place for place, group in enumerate(groups) if not has_signal(group)]
        new = [group for group in groups if has_signal(group)]
        generator = np.random.default_rng([self.seed, number, 2])
        chosen = generator.permutation(len(self.groups))[: len(idle)].tolist()
        groups = list(groups)
        for place, index in zip(idle, chosen, strict=False):
            groups[place] = self.groups[index]
        self.groups.extend(new)
        return groups, len(chosen)


def split_into_steps(samples: Sequence[TrainingTrace], parts: int, group: int = 1) -> list[list[TrainingTrace]]:
    """The round's traces cut into `parts` steps of equal size, between groups of `group` traces."""
    bounds = np.linspace(0, len(samples) // group, parts + 1).round().astype(int) * group
    return [list(samples[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def pass_at_k(count: int, passed: int, k: int) -> float:
    """The chance that one of k completions passes, estimated without bias from `count` completions of which `passed`
    do (Chen et al. 2021, arXiv:2107.03374, equation 1): 1 - C(count - passed, k) / C(count, k)."""
    return 1.0 - math.comb(count - passed, k) / math.comb(count, k)


def evaluation_metrics(judged: Sequence[tuple[float, list[float]]], threshold: float) -> dict[str, float]:
    """The mean reward over prompts with half the width of its 95 % interval, and `pass_at_k`, for k of 1 and of all."""
    means = np.array([mean for mean, _ in judged], dtype=np.float64)
    means = means[np.isfinite(means)]
    if not len(means):
        return {}
    spread = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    found = {"reward": float(means.mean()), "reward_ci95": float(1.96 * spread)}
    fewest = min(len(rewards) for _, rewards in judged)
    for k in sorted({1, fewest}):
        chances = []
        for _, rewards in judged:
            chances.append(pass_at_k(len(rewards), sum(reward >= threshold for reward in rewards), k))
        found[f"pass@{k}"] = float(np.mean(chances))
    return found
