"""Scores of traces to what a value function and a policy learn from: the columns `returns` and `advantages`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl.losses import value
from trl.rollout.traces import Columns


class Judged(NamedTuple):
    """A trace that this rank holds, with its score. `trained` is 0 if nothing of it trains."""

    columns: Columns
    trained: int
    score: float


def give_returns(
    traces: Sequence[Judged],
    *,
    token_kl: Callable[[Columns], np.ndarray],
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    added_up: Callable[[Tensor], Tensor],
) -> None:
    """Write the columns `returns` and `advantages`, made of the column `values`, the divergence of each token and the
    score of the trace.

    Tokens that do not train (an environment's) are stepped over. `added_up` sums numbers over the ranks that hold the
    round: advantages, and with `whiten_rewards` rewards, are scaled by the moments of all its tokens.
    """
    masks = [
        each.columns.get("mask", np.ones(len(each.columns["ids"]), dtype=bool)) & (each.trained > 0) for each in traces
    ]

    def grid(columns: Sequence[np.ndarray]) -> Tensor:
        parts = [torch.from_numpy(column[mask]) for column, mask in zip(columns, masks, strict=True)]
        return pad_sequence(parts, batch_first=True) if parts else torch.zeros(0, 0)

    value_ST = grid([each.columns["values"] for each in traces])
    length_S = torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.int64)
    inside_ST = torch.arange(value_ST.shape[1]) < length_S[:, None]
    reward_ST = value.token_rewards(
        kl_ST=grid([token_kl(each.columns) for each in traces]),
        score_S=torch.tensor([each.score for each in traces]),
        length_S=length_S,
        kl_coef=kl_coef,
    )
    if whiten_rewards:
        moments = added_up(value.moments(reward_ST[inside_ST]))
        reward_ST = value.whitened(reward_ST, moments, shift_mean=False) * inside_ST
    advantage_ST = value.gae(reward_ST=reward_ST, value_ST=value_ST, gamma=gamma, lam=lam)
    return_ST = advantage_ST + value_ST
    advantage_ST = value.whitened(advantage_ST, added_up(value.moments(advantage_ST[inside_ST])))
    for place, (each, mask) in enumerate(zip(traces, masks, strict=True)):
        for name, values in (("returns", return_ST), ("advantages", advantage_ST)):
            column = np.zeros(len(mask), dtype=np.float32)
            column[mask] = values[place, : int(length_S[place])].numpy()
            each.columns[name] = column


def token_kl(columns: Columns, penalty: str) -> np.ndarray:
    """The divergence of each token of a trace from the reference, [T], by one of the kinds of `kl_penalty`. Zeros where
    no reference was asked."""
    if "ref_logps" not in columns:
        return np.zeros_like(columns["old_logps"])
    if penalty == "full":
        return columns["divergences"]
    logp, ref_logp = torch.from_numpy(columns["old_logps"]), torch.from_numpy(columns["ref_logps"])
    return value.KL_PENALTIES[penalty](logp, ref_logp).numpy()
