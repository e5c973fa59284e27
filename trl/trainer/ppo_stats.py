"""The statistics of a PPO step, under the names that loops of one's own read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trl.rollout.traces import Columns, ScoredTrace

# Of the means over all steps of a round, by the names of the log.
MEANS = {
    "ppo/loss/policy": "loss/policy_avg",
    "ppo/loss/value": "loss/value_avg",
    "ppo/policy/entropy": "policy/entropy_avg",
    "ppo/policy/approxkl": "policy/approxkl_avg",
    "ppo/policy/policykl": "policy/policykl_avg",
    "ppo/policy/clipfrac": "policy/clipfrac_avg",
    "ppo/policy/ratio": "val/ratio",
    "ppo/val/vpred": "val/value",
    "ppo/val/error": "val/error",
    "ppo/val/clipfrac": "val/clipfrac_avg",
}


def round_means(score_S: Tensor, kl: float, kl_coef: float, traces: Sequence[ScoredTrace]) -> dict[str, float]:
    """What the log says of a round: `score_S` are the scores of all ranks' completions, `kl` their mean divergence."""
    score = float(score_S.mean())
    return {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/scores": score,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
        "val/num_eos_tokens": float(sum(each.finished for each in traces)),
    }


def step_stats(
    traces: Sequence[ScoredTrace],
    means: Mapping[str, float],
    *,
    score_S: Tensor,
    kl_coef: float,
    vf_coef: float,
    token_kl: Callable[[Columns], np.ndarray],
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Numbers of a step, and arrays of what this rank holds: `traces` and `score_S`, scaled and clipped, are those of
    all ranks, `means` those of the log, `prompts` this rank's."""
    own = [each.columns for each in traces if each.columns is not None]
    scores = score_S.double().numpy()
    kls = np.array([each.kl for each in traces])
    found: dict[str, Any] = {
        "objective/kl": float(kls.mean()),
        "objective/kl_dist": kls,
        "objective/logprobs": _grid([each["old_logps"] for each in own]),
        "objective/ref_logprobs": _grid([each.get("ref_logps", each["old_logps"]) for each in own]),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(np.mean([-each["old_logps"].sum() for each in own])),
        "ppo/mean_non_score_reward": -kl_coef * float(_trained(own, token_kl).mean()),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": _std(scores),
        "ppo/policy/advantages": _trained(own, lambda each: each["advantages"]),
    }
    lengths_of = {"queries": [len(each) for each in prompts], "responses": [len(each["ids"]) for each in own]}
    for name, lengths in lengths_of.items():
        found[f"tokens/{name}_len_mean"] = float(np.mean(lengths))
        found[f"tokens/{name}_len_std"] = _std(np.array(lengths, dtype=np.float64))
        found[f"tokens/{name}_dist"] = np.array(lengths, dtype=np.float32)
    found |= {name: means[source] for name, source in MEANS.items() if source in means}
    if "ppo/loss/policy" in found:
        found["ppo/loss/total"] = found["ppo/loss/policy"] + vf_coef * found["ppo/loss/value"]
    found["ppo/policy/advantages_mean"] = float(found["ppo/policy/advantages"].mean())
    returns, values = _trained(own, lambda each: each["returns"]), _trained(own, lambda each: each["values"])
    found |= {"ppo/returns/mean": float(returns.mean()), "ppo/returns/var": float(returns.var())}
    found |= {"ppo/val/mean": float(values.mean()), "ppo/val/var": float(values.var())}
    if found["ppo/returns/var"] > 0 and "ppo/val/error" in found:
        found["ppo/val/var_explained"] = 1 - found["ppo/val/error"] / found["ppo/returns/var"]
    return found


def step_times(began: float, scored: float, credited: float, trained: float, ended: float) -> dict[str, float]:
    """Seconds of the parts of a step, of the times at which they ended."""
    return {
        "time/ppo/forward_pass": scored - began,
        "time/ppo/compute_advantages": credited - scored,
        "time/ppo/optimize_step": trained - credited,
        "time/ppo/calc_stats": ended - trained,
        "time/ppo/total": ended - began,
    }


def log_line(stats: Mapping[str, Any], reward_S: Tensor) -> dict[str, float]:
    """The numbers among `stats`, with mean and deviation of the rewards of all ranks, [S]."""
    found = {name: float(each) for name, each in stats.items() if np.ndim(each) == 0}
    found["env/reward_mean"] = float(reward_S.mean())
    found["env/reward_std"] = float(reward_S.std()) if len(reward_S) > 1 else 0.0
    return found


def table_of(columns: Mapping[str, Sequence[Any]], step: int) -> list[dict[str, Any]]:
    """Columns of a batch as rows of the table of completions."""
    rows = zip(*columns.values(), strict=True)
    return [{"step": step, "mode": "train", **dict(zip(columns, row, strict=True))} for row in rows]


def _trained(own: Sequence[Columns], column: Callable[[Columns], np.ndarray]) -> np.ndarray:
    return np.concatenate([column(each)[each.get("mask", slice(None))] for each in own])


def _grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of uneven lengths as an array [S, T], 0 beyond their ends."""
    found = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
