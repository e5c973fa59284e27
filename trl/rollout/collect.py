"""The collector: prompts in, traces with their rewards out.

Three parts, each of one or two methods, can be exchanged: a `Sampler` writes, an `Environment` answers (without one a
trace ends after the first turn), a `Judge` gives rewards. The collector splits the work among the ranks and gathers the
numbers that all of them need.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trl.rollout.exchange import anyone, gathered
from trl.rollout.rounds import RefillPrompts
from trl.rollout.traces import Columns, ScoredTrace, grouped
from trl.rollout.types import Completion, Environment, Request, Sampler, Sampling


class Judge(Protocol):
    """Scores completions by `F` functions, whose `names` and `weights`, [F], it holds."""

    names: list[str]
    weights: Tensor

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """Rewards, [completions, F] in fp32; NaN where a function does not apply."""
        ...


class Unjudged:
    """The judge of a method without rewards: none of its functions, so no rewards."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.weights = torch.zeros(0)
        self.functions: list[Any] = []
        self.judges: list[Any] = []

    def score(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(prompts), 0)


class Collected(NamedTuple):
    """What a round is made of: whole groups of traces in the order of their prompts."""

    traces: list[ScoredTrace]
    sampled: list[ScoredTrace]  # every trace that was sampled, those that others replaced among them
    logged: dict[str, list[float]]  # what reward functions logged on this rank, by name


class Place(NamedTuple):
    """Which rank of how many this is, and where its tensors are."""

    rank: int
    ranks: int
    device: torch.device


# A forward pass over all traces: rows and columns of their traces in, further columns for each trace out.
Scorer = Callable[[Sequence[Mapping[str, Any]], Sequence[Columns]], Sequence[Columns]]


@dataclass
class Collector:
    """Samples traces and scores them.

    `environment` is None for single turns. `decode` turns token ids of several completions into their texts.
    `own_columns` are those of a row that reward functions do not get. With `whole_groups` a group is sampled and judged
    on one rank. `mask_truncated` leaves traces that were cut
    untrained. `divergence` estimates a trace's divergence from its columns. With `keeps_texts` traces carry what the
    table of completions shows.
    """

    sampler: Sampler
    judge: Judge
    sampling: Sampling
    decode: Callable[[list[list[int]]], list[str]]
    seed: int
    own_columns: frozenset[str]
    environment: Environment | None = None
    mask_truncated: bool = False
    divergence: Callable[[Columns], float] | None = None
    keeps_texts: bool = False
    whole_groups: bool = False

    def collect(
        self,
        model: nn.Module,
        rows: Sequence[Mapping[str, Any]],
        generations: int,
        *,
        version: int,
        number: int,
        place: Place,
        scorers: Sequence[Scorer],
        context: Mapping[str, Any],
    ) -> Collected:
        """`generations` traces of every row. Every rank is given all rows, samples its part of the traces, and learns
        the numbers of the others'.

        `number` is that of the round, which names its random numbers with the seed and the row; `version` that of the
        policy. `scorers` give further columns. `context` is handed to the judge.
        """
        self.sampler.sync(model, version)
        parts = np.array_split(np.arange(len(rows) * generations), place.ranks)
        if self.whole_groups:
            of_rows = np.array_split(np.arange(len(rows)), place.ranks)
            parts = [(each[:, None] * generations + np.arange(generations)).ravel() for each in of_rows]
        mine = parts[place.rank].tolist()
        columns, finished = self._sampled(rows, mine, generations, number, place.device)
        of_row = [rows[each // generations] for each in mine]
        texts = self.decode([each["ids"].tolist() for each in columns]) if columns else []
        rewards_SF, extra, logged = self._judged(of_row, columns, texts, context)
        for scorer in scorers:
            for own, further in zip(columns, scorer(of_row, columns), strict=True):
                own.update(further)
        shown: list[Any] = [None] * len(columns)
        if self.keeps_texts:
            shown = [(row["prompt"], *rest) for row, *rest in zip(of_row, texts, extra, strict=True)]

        numbers = np.zeros((len(columns), 4 + len(self.judge.names)))
        for index, (each, ended) in enumerate(zip(columns, finished, strict=True)):
            kl = 0.0 if self.divergence is None else self.divergence(each)
            numbers[index, :4] = len(each["ids"]), self._trained(each, ended), ended, kl
        numbers[:, 4:] = rewards_SF.numpy()
        if place.ranks > 1:
            numbers = gathered(numbers, [len(each) for each in parts], place.device)
        prompts = [np.asarray(row["prompt_ids"], dtype=np.int32) for row in rows]
        held = dict(zip(mine, zip(columns, shown, strict=True), strict=True))
        holders = [rank for rank, part in enumerate(parts) for _ in part]
        traces = []
        for which, ((length, trained, finish, kl, *rewards), holder) in enumerate(
            zip(numbers.tolist(), holders, strict=True)
        ):
            row, (own_columns, own_shown) = which // generations, held.get(which, (None, None))
            traces.append(
                ScoredTrace(
                    row=int(rows[row]["row"]),
                    prompt_ids=prompts[row],
                    length=int(length),
                    trained=int(trained),
                    finished=bool(finish),
                    rewards=rewards,
                    kl=kl,
                    holder=holder,
                    columns=own_columns,
                    version=version,
                    shown=own_shown,
                )
            )
        return Collected(traces, traces, logged)

    def _trained(self, columns: Columns, finished: bool) -> int:
        if self.mask_truncated and not finished:
            return 0
        return int(columns["mask"].sum()) if "mask" in columns else len(columns["ids"])

    # --- sampling -------------------------------------------------------------------------------------------------

    def _sampled(
        self,
        rows: Sequence[Mapping[str, Any]],
        which: Sequence[int],
        generations: int,
        number: int,
        device: torch.device,
    ) -> tuple[list[Columns], list[bool]]:
        """The traces numbered `which` (a row's are `generations` in a row), and whether each ended by itself."""
        seeds = [(self.seed, number + 1, int(row["row"])) for row in rows]
        samples: dict[int, list[int]] = {}
        for row, sample in (divmod(each, generations) for each in which):
            samples.setdefault(row, []).append(sample)
        requests = [Request(rows[row]["prompt_ids"], len(own), seeds[row], own[0]) for row, own in samples.items()]
        groups = self.sampler.generate(requests, self.sampling)
        completions = [completion for group in groups for completion in group]
        columns = [_columns(each) for each in completions]
        finished = [each.finished for each in completions]
        if self.environment is not None:
            finished = self._played(rows, which, generations, seeds, columns, finished, device)
        return columns, finished

    def _played(
        self,
        rows: Sequence[Mapping[str, Any]],
        which: Sequence[int],
        generations: int,
        seeds: Sequence[tuple[int, ...]],
        columns: list[Columns],
        finished: list[bool],
        device: torch.device,
    ) -> list[bool]:
        """Let the environment answer, and the policy go on, until every trace has ended or is full; `columns` grow by
        what both write. Whether each ended by itself."""
        assert self.environment is not None
        episodes = [self.environment.start(rows[each // generations]) for each in which]
        for own in columns:
            own["mask"] = np.ones(len(own["ids"]), dtype=np.bool_)
        waiting, turn, ended = list(range(len(which))), 0, list(finished)
        while anyone(bool(waiting), device):
            requests, going_on, turn = [], [], turn + 1
            for place in waiting:
                own = columns[place]
                # A turn that was cut is no turn: nothing answers it.
                answer = episodes[place].step(own["ids"].tolist()) if ended[place] else None
                left = self.sampling.max_new_tokens - len(own["ids"]) - len(answer or ())
                if answer is None:
                    continue
                if left < 1:
                    ended[place] = False
                    continue
                _append(own, answer)
                row, sample = divmod(which[place], generations)
                prompt = [*rows[row]["prompt_ids"], *own["ids"].tolist()]
                requests.append(Request(prompt, 1, (*seeds[row], turn), sample, left))
                going_on.append(place)
            # Also with nothing to ask: ranks whose weights are sharded call the model together.
            groups = self.sampler.generate(requests, self.sampling)
            for place, (completion,) in zip(going_on, groups, strict=True):
                _append(columns[place], completion.ids, completion.logps)
                ended[place] = completion.finished
            waiting = going_on
        return ended

    # --- judging --------------------------------------------------------------------------------------------------

    def _judged(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[Columns],
        texts: Sequence[str],
        context: Mapping[str, Any],
    ) -> tuple[Tensor, list[dict[str, Any]], dict[str, list[float]]]:
        """The rewards of this rank's traces, [S, F]; what functions want to show beside each; what they log."""
        extra: list[dict[str, Any]] = [{} for _ in rows]
        logged: dict[str, list[float]] = defaultdict(list)
        if not rows:  # a rank may have none
            return torch.zeros(0, len(self.judge.names)), extra, logged

        def keep(name: str, values: Sequence[Any]) -> None:
            for own, value in zip(extra, values, strict=True):
                own[name] = value

        prompts = [row["prompt"] for row in rows]
        replies: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        rewards_SF = self.judge.score(
            prompts,
            replies,
            [each["ids"].tolist() for each in columns],
            {name: [row[name] for row in rows] for name in rows[0] if name not in self.own_columns},
            log_extra=keep,
            log_metric=lambda name, value: logged[name].append(float(value)),
            **context,
        )
        return rewards_SF, extra, logged


def refilled(
    first: Collected,
    generations: int,
    rounds: int,
    prompts: RefillPrompts,
    collect: Callable[[list[int]], Collected],
    has_signal: Callable[[list[ScoredTrace]], Sequence[bool]],
) -> tuple[Collected, int]:
    """The round with groups of other prompts in place of those without a signal, and how many still have none.

    `collect` samples the rows of these numbers; it is asked at most `rounds` times. `has_signal` says it of each group.
    DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476, section 3.2).
    """
    wanted, latest = len(first.traces) // generations, first
    sampled: list[ScoredTrace] = []
    kept: list[list[ScoredTrace]] = []
    idle: list[list[ScoredTrace]] = []
    logged: dict[str, list[float]] = defaultdict(list)
    for refills in range(rounds + 1):
        sampled += latest.traces
        for name, values in latest.logged.items():
            logged[name] += values
        for group, has in zip(grouped(latest.traces, generations), has_signal(latest.traces), strict=True):
            (kept if has else idle).append(group)
        missing = wanted - len(kept) if refills < rounds else 0
        rows = prompts.take(missing, {each.row for each in sampled})
        if not rows:
            break
        latest = collect(rows)
    groups = (kept + idle)[:wanted]
    return Collected([each for group in groups for each in group], sampled, logged), max(0, wanted - len(kept))


def _columns(completion: Completion) -> Columns:
    return {
        "ids": np.asarray(completion.ids, dtype=np.int32),
        "logps": np.asarray(completion.logps, dtype=np.float32),
    }


def _append(columns: Columns, ids: Sequence[int], logps: Sequence[float] | None = None) -> None:
    """More tokens at the end of a trace; those without log-probs are the environment's, and are not trained on."""
    more = {
        "ids": np.asarray(ids, dtype=np.int32),
        "logps": np.zeros(len(ids), dtype=np.float32) if logps is None else np.asarray(logps, dtype=np.float32),
        "mask": np.full(len(ids), logps is not None),
    }
    for name, values in more.items():
        columns[name] = np.concatenate([columns[name], values])
