"""What is logged of a round: its metrics under upstream's names, and the rows of the table of completions."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl.losses.advantages import total_reward, without_spread
from trl.rollout.traces import ScoredTrace

Means = dict[str, tuple[Tensor, float]]  # by name: a mean, and how many items it is of


def round_metrics(
    traces: Sequence[ScoredTrace],
    rewards_SF: Tensor,
    weights_F: Tensor,
    names: Sequence[str],
    generations: int,
    kl_S: Tensor | None,
) -> tuple[Means, dict[str, Tensor]]:
    """Means over the traces, and the values whose smallest and largest are logged, by what they are of.

    `names` are those of the reward functions, if there are any, `kl_S` the divergence of each trace where it is known.
    """
    count = float(len(traces))
    means: Means = {}
    if names:
        total_S = total_reward(rewards_SF, weights_F)
        means["reward"] = total_S.nanmean(), float((~total_S.isnan()).sum())
        means["reward_std"] = _std(total_S), count
        means["frac_reward_zero_std"] = without_spread(rewards_SF, weights_F, generations).float().mean(), count
    for index, name in enumerate(names):
        reward_S = rewards_SF[:, index]
        means[f"rewards/{name}/mean"] = reward_S.nanmean(), float((~reward_S.isnan()).sum())
        means[f"rewards/{name}/std"] = _std(reward_S), count
    length_S = torch.tensor([float(each.length) for each in traces])
    ended_S = torch.tensor([each.finished for each in traces])
    ranges = {"length": length_S, "terminated_length": length_S[ended_S]}
    for what, values in ranges.items():
        if len(values):
            means[f"completions/mean_{what}"] = values.mean(), float(len(values))
    means["completions/clipped_ratio"] = (~ended_S).float().mean(), count
    if kl_S is not None:
        means["kl"] = kl_S.sum() / length_S.sum().clamp(min=1), float(length_S.sum())
    return means, {what: values for what, values in ranges.items() if len(values)}


def table_rows(
    traces: Sequence[ScoredTrace], advantages: Sequence[float], names: Sequence[str], step: int, mode: str
) -> list[tuple[int, dict[str, Any]]]:
    """The rows of the table of completions whose texts are on this rank, each with its place in the round."""
    rows = []
    for place, (each, advantage) in enumerate(zip(traces, advantages, strict=True)):
        if each.shown is None:
            continue
        prompt, text, extra = each.shown
        row = {
            "step": step,
            "mode": mode,
            "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
            "completion": text,
            **dict(zip(names, each.rewards, strict=True)),
            "advantage": advantage,
            **extra,
        }
        rows.append((place, row))
    return rows


def of_all_ranks(rows: list[tuple[int, dict[str, Any]]], ranks: int, in_order: bool) -> list[dict[str, Any]]:
    """The rows of all ranks on the first one, by their places if `in_order`. Every rank calls it."""
    if ranks > 1:
        every: list[Any] | None = [None] * ranks if torch.distributed.get_rank() == 0 else None
        torch.distributed.gather_object(rows, every)
        rows = [row for part in every or [] for row in part]
    if in_order:
        rows = sorted(rows, key=lambda row: row[0])
    return [row for _, row in rows]


def _std(values: Tensor) -> Tensor:
    good = values[~values.isnan()]
    return good.std() if len(good) > 1 else values.new_zeros(())
