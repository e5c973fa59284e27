"""Policy-gradient losses as a product: a surrogate for each token, times a way of adding them up.

`N` trained tokens, `S` sequences. A ratio is that of the policy to the one that drew the tokens; `pool` says over what
its logarithm is averaged first. Advantages are per token, all alike in a sequence.

The exponential of a log-ratio is exact up to `MAX_LOG_RATIO` and follows its tangent beyond. In fp32 that of more than
88 is infinite, and its gradient is not a number even where clipping takes the ratio out of the loss.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tokens import bounded_exp, seq_mean, seq_sum

# A ratio of 5e8 says no more than a larger one, and its gradient still has a norm in fp32.
MAX_LOG_RATIO = 20.0

# --- the ratio ------------------------------------------------------------------------------------------------------


def ratio(log_ratio: Tensor) -> Tensor:
    """`exp(log_ratio)`, exact up to `MAX_LOG_RATIO` and along its tangent beyond, in any shape."""
    return bounded_exp(log_ratio, MAX_LOG_RATIO)


def pool(log_ratio_N: Tensor, *, seq_N: Tensor, sequences: int, importance_sampling_level: str) -> Tensor:
    """The log-ratio that a surrogate reads, [N] -> [N]: each token's own, or the mean over its sequence.

    "sequence": GSPO, Zheng et al. 2025, arXiv:2507.18071, equation 7. "sequence_token": the sequence's value with each
    token's own gradient (GSPO-token, equation 13).
    """
    if importance_sampling_level == "token":
        return log_ratio_N
    mean_N = seq_mean(log_ratio_N, seq_N, sequences)[seq_N]
    if importance_sampling_level == "sequence":
        return mean_N
    return mean_N.detach() + log_ratio_N - log_ratio_N.detach()


def _either(condition_N: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One number or the other, in the precision of `like`."""
    return torch.where(condition_N, like.new_tensor(yes), like.new_tensor(no))


# --- surrogates: [N] each -------------------------------------------------------------------------------------------


def clip(
    *, ratio_N: Tensor, advantage_N: Tensor, epsilon: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """`-min(r A, clip(r, 1 - e, 1 + e_high) A)`, with r itself at most `delta` where that is set, [N] -> [N].

    PPO, Schulman et al. 2017, arXiv:1707.06347, equation 7; `epsilon_high` from DAPO, Yu et al. 2025, arXiv:2503.14476,
    equation 8; `delta` from INTELLECT-2, arXiv:2505.07291.
    """
    clipped_N = ratio_N.clamp(1 - epsilon, 1 + epsilon_high)
    free_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    return -torch.minimum(free_N * advantage_N, clipped_N * advantage_N)


def cispo(*, ratio_N: Tensor, advantage_N: Tensor, logp_N: Tensor, epsilon_high: float) -> Tensor:
    """`-sg[min(r, e_high)] A log pi`, [N] -> [N]: every token keeps its gradient. MiniMax-M1, arXiv:2506.13585,
    equation 4."""
    return -ratio_N.clamp(max=epsilon_high).detach() * advantage_N * logp_N


def sapo(*, ratio_N: Tensor, advantage_N: Tensor, sapo_temperature_pos: float, sapo_temperature_neg: float) -> Tensor:
    """`-(4 / t) s(t (r - 1)) A`, with t by the advantage's sign, [N] -> [N].

    SAPO, Gao et al. 2025, arXiv:2511.20347.
    """
    temperature_N = _either(advantage_N > 0, sapo_temperature_pos, sapo_temperature_neg, advantage_N)
    return -torch.sigmoid(temperature_N * (ratio_N - 1)) * 4 / temperature_N * advantage_N


def vespo(
    *,
    log_ratio_N: Tensor,
    advantage_N: Tensor,
    logp_N: Tensor,
    seq_N: Tensor,
    sequences: int,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
    log_correction_N: Tensor | None = None,
) -> Tensor:
    """`-sg[w] A log pi` with `w = exp(l + k log W - l W)` of the sequence's ratio W, k and l by the advantage's sign,
    [N] -> [N]: w is 1 where W is. VESPO, arXiv:2602.10693.

    `log_correction_N` is of each token, and corrects for another sampler.
    """
    weight_N = vespo_weight(
        log_ratio_N=log_ratio_N,
        advantage_N=advantage_N,
        seq_N=seq_N,
        sequences=sequences,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        log_correction_N=log_correction_N,
    )
    return -weight_N * advantage_N * logp_N


def vespo_weight(
    *,
    log_ratio_N: Tensor,
    advantage_N: Tensor,
    seq_N: Tensor,
    sequences: int,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
    log_correction_N: Tensor | None = None,
) -> Tensor:
    """The w of `vespo`, without a gradient, alike for all tokens of a sequence, [N] -> [N]."""
    lowest = math.log(1e-8)
    log_S = seq_sum(log_ratio_N.detach().clamp(-20, 20), seq_N, sequences)
    if log_correction_N is not None:
        log_S = log_S + seq_sum(log_correction_N.clamp(lowest, 20), seq_N, sequences)
    log_N = log_S.clamp(lowest, 20)[seq_N]
    k_N = _either(advantage_N >= 0, vespo_k_pos, vespo_k_neg, log_N)
    rate_N = _either(advantage_N >= 0, vespo_lambda_pos, vespo_lambda_neg, log_N).clamp(min=1e-4)
    return (rate_N + k_N * log_N - rate_N * log_N.exp()).exp().nan_to_num(0.0, 0.0, 0.0)


def gmpo(
    *,
    log_ratio_N: Tensor,
    advantage_N: Tensor,
    seq_N: Tensor,
    sequences: int,
    epsilon: float,
    epsilon_high: float,
) -> Tensor:
    """`-A exp(mean_t min-clip(log r_t))`: the geometric mean of clipped ratios, the same for all tokens of a sequence,
    [N] -> [N]. Ratios are clipped in logarithm to `[-e, e_high]`, on the side where clipping lowers `r A`.

    GMPO, Zhao et al. 2025, arXiv:2507.20673, equation 4.
    """
    clipped_N = log_ratio_N.clamp(-epsilon, epsilon_high)
    chosen_N = torch.where(
        advantage_N >= 0, torch.minimum(log_ratio_N, clipped_N), torch.maximum(log_ratio_N, clipped_N)
    )
    return -advantage_N * ratio(seq_mean(chosen_N, seq_N, sequences))[seq_N]


# --- what else a token adds -----------------------------------------------------------------------------------------


def k3(*, logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """`exp(q) - q - 1` with `q = log ref - log pi`: an estimate of KL(pi || ref) that is never negative, [N] -> [N].
    The exponential is `ratio`'s.

    Schulman 2020, "Approximating KL divergence", k3; arXiv:2402.03300, equation 4.
    """
    gap_N = ref_logp_N - logp_N
    return ratio(gap_N) - gap_N - 1


def off_policy_keep(
    *,
    advantage_N: Tensor,
    logp_N: Tensor,
    sampler_logp_N: Tensor,
    seq_N: Tensor,
    sequences: int,
    off_policy_mask_threshold: float,
) -> Tensor:
    """1 for the tokens of kept sequences, else 0, [N] -> [N]: those of an advantage that is not negative, or whose mean
    `log old - log pi` is at most the threshold. DeepSeek-V3.2, arXiv:2512.02556, equation 9."""
    gap_N = (sampler_logp_N - logp_N.detach()).nan_to_num(0.0)
    near_S = seq_mean(gap_N, seq_N, sequences) <= off_policy_mask_threshold
    return ((advantage_N >= 0) | near_S[seq_N]).to(logp_N.dtype)


def correction(
    *,
    policy_logp_N: Tensor,
    sampler_logp_N: Tensor,
    seq_N: Tensor,
    sequences: int,
    mode: str,
    low: float | None,
    high: float | None,
) -> Tensor:
    """The weight that makes up for a sampler whose log-probs are not the trainer's, [N] -> [N], without a gradient.

    `mode` is `token_truncate`, `token_mask`, `sequence_truncate`, `sequence_mask`, or the same with `geometric` (the
    mean of a sequence's log-ratios in place of their sum): ratios outside `[low, high]` are set to the bound, or to 0.
    Without a `high`, a weight is at most `exp(MAX_LOG_RATIO)`.
    Truncated and masked importance sampling, Yao et al. 2025 ("Your efficient RL framework secretly brings you
    off-policy RL training") and Liu et al. 2025.
    """
    level, _, what = mode.partition("_")
    gap_N = (policy_logp_N - sampler_logp_N).detach().nan_to_num(0.0)
    if level == "sequence":
        gap_N = seq_sum(gap_N, seq_N, sequences)[seq_N]
    elif level == "geometric":
        gap_N = seq_mean(gap_N, seq_N, sequences)[seq_N]
    ratio_N = gap_N.clamp(max=MAX_LOG_RATIO).exp()
    if what == "truncate":
        return ratio_N.clamp(low, high) if low is not None or high is not None else ratio_N
    outside_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    if low is not None:
        outside_N |= ratio_N < low
    if high is not None:
        outside_N |= ratio_N > high
    return ratio_N.masked_fill(outside_N, 0.0)


def quantile(values_N: Tensor, share: float) -> Tensor:
    """The value that `share` of all values lie below, linear between neighbours: `torch.quantile`, which refuses more
    than 2^24 values. [N] -> scalar."""
    order_N = values_N.sort().values
    place = share * (len(order_N) - 1)
    below = min(math.floor(place), max(len(order_N) - 2, 0))
    return torch.lerp(order_N[below], order_N[min(below + 1, len(order_N) - 1)], place - below)


def high_entropy(entropy_N: Tensor, *, threshold: Tensor) -> Tensor:
    """1 for tokens whose entropy is at least the threshold, else 0, [N] -> [N]: "Beyond the 80/20 rule", Wang et al.
    2025, arXiv:2506.01939."""
    return (entropy_N >= threshold).to(entropy_N.dtype)


# --- adding up ------------------------------------------------------------------------------------------------------

# What a sum is divided by, over the whole optimizer step.
SEQUENCES, TOKENS, BUDGET = "sequences", "tokens", "budget"


def by_sequence(loss_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """The sum over sequences of their means over tokens, [N] -> scalar; to be divided by the sequences."""
    return seq_mean(loss_N, seq_N, sequences).sum()


def by_token(loss_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """The sum over tokens, [N] -> scalar."""
    return loss_N.sum()


class Bounds(NamedTuple):
    """Where a surrogate clips the ratio."""

    low: float
    high: float


def ratio_bounds(epsilon: float, epsilon_high: float) -> Bounds:
    return Bounds(1 - epsilon, 1 + epsilon_high)


def log_ratio_bounds(epsilon: float, epsilon_high: float) -> Bounds:
    return Bounds(math.exp(-epsilon), math.exp(epsilon_high))


def upper_bound(epsilon: float, epsilon_high: float) -> Bounds:
    return Bounds(0.0, epsilon_high)


class PolicyLoss(NamedTuple):
    """A loss by policy gradient.

    `surrogate` gives a loss for each token from what its arguments name. `add_up` sums them, and the sum is divided by
    the items of the kind `divide_by` in the optimizer step. `bounds` gives the bounds at which the surrogate clips, for
    the metrics of clipping; None: it clips nowhere. `reads_tokens`: it reads each token's own ratio whatever
    `importance_sampling_level` is. `metrics` are names, and numbers for each token whose mean over sequences is logged.
    """

    surrogate: Callable[..., Tensor]
    add_up: Callable[[Tensor, Tensor, int], Tensor] = by_token
    divide_by: str = TOKENS
    bounds: Callable[[float, float], Bounds] | None = None
    reads_tokens: bool = False
    metrics: tuple[tuple[str, Callable[..., Tensor]], ...] = ()

    @property
    def corrects_itself(self) -> bool:
        """Whether the surrogate itself takes the weight that makes up for another sampler."""
        return "log_correction_N" in inspect.signature(self.surrogate).parameters


POLICY_LOSSES: dict[str, PolicyLoss] = {
    # Shao et al. 2024, arXiv:2402.03300, equation 3: mean over tokens, then over sequences.
    "grpo": PolicyLoss(clip, by_sequence, SEQUENCES, ratio_bounds),
    # Mean over tokens. Upstream takes it over each micro-batch; here it is that of the step, so that the two are alike.
    "bnpo": PolicyLoss(clip, by_token, TOKENS, ratio_bounds),
    # Liu et al. 2025, arXiv:2503.20783: divided by sequences × max_completion_length, whatever their lengths.
    "dr_grpo": PolicyLoss(clip, by_token, BUDGET, ratio_bounds),
    # Yu et al. 2025, arXiv:2503.14476, equation 12.
    "dapo": PolicyLoss(clip, by_token, TOKENS, ratio_bounds),
    "cispo": PolicyLoss(cispo, by_token, TOKENS, upper_bound),
    "sapo": PolicyLoss(sapo, by_sequence, SEQUENCES),
    # arXiv:2602.05261: sum over tokens, mean over sequences.
    "luspo": PolicyLoss(clip, by_token, SEQUENCES, ratio_bounds),
    "vespo": PolicyLoss(vespo, by_token, TOKENS, metrics=(("vespo/phi_seq_mean", vespo_weight),)),
    "gmpo": PolicyLoss(gmpo, by_sequence, SEQUENCES, log_ratio_bounds, reads_tokens=True),
}
