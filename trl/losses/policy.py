"""Policy-gradient losses: each is a surrogate per token and a reduction over tokens.

`N` trained tokens, `S` sequences. The importance ratio compares the policy with the policy that sampled the tokens;
`pool` averages its logarithm over a sequence first, if asked to. Advantages are per token, equal within a sequence.

The exponential of a log-ratio is exact up to `MAX_LOG_RATIO` and follows its tangent beyond. In fp32 the exponential of
more than 88 is infinite, and its gradient would be NaN even where clipping removes the ratio from the loss.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tokens import bounded_exp, seq_mean, seq_sum

# A ratio of 5e8 is as good as any larger one, and the norm of its gradient is finite in fp32.
MAX_LOG_RATIO = 20.0

# --- the ratio ------------------------------------------------------------------------------------------------------


def ratio(log_ratio: Tensor) -> Tensor:
    """`exp(log_ratio)`, exact up to `MAX_LOG_RATIO`, its tangent beyond; any shape."""
    return bounded_exp(log_ratio, MAX_LOG_RATIO)


def pool(log_ratio_N: Tensor, *, seq_N: Tensor, sequences: int, importance_sampling_level: str) -> Tensor:
    """The log-ratio that a surrogate reads, [N] -> [N]: of each token ("token"), or the mean over its sequence.

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
    """`yes` where the condition holds, else `no`, in the dtype of `like`, [N]."""
    return torch.where(condition_N, like.new_full((), yes), like.new_full((), no))


# --- surrogates: [N] each -------------------------------------------------------------------------------------------


def clip(
    *, ratio_N: Tensor, advantage_N: Tensor, epsilon: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """`-min(r A, clip(r, 1 - e, 1 + e_high) A)`, [N] -> [N]; the unclipped r is at most `delta`, if that is set.

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
    """`-(4 / t) s(t (r - 1)) A`, where the sign of A selects the temperature t, [N] -> [N].

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
    """`-sg[w] A log pi` with `w = exp(l + k log W - l W)`, [N] -> [N]. W is the ratio of the sequence; the sign of A
    selects k and l; w is 1 where W is 1. VESPO, arXiv:2602.10693.

    `log_correction_N` is the log-weight of each token that corrects for another sampler.
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
    """The w of `vespo`, without a gradient, equal for all tokens of a sequence, [N] -> [N]."""
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
    """`-A exp(mean_t min-clip(log r_t))`, [N] -> [N]: the geometric mean of clipped ratios, equal for all tokens of a
    sequence. Log-ratios are clipped to `[-e, e_high]`, on the side where clipping lowers `r A`.

    GMPO, Zhao et al. 2025, arXiv:2507.20673, equation 4.
    """
    clipped_N = log_ratio_N.clamp(-epsilon, epsilon_high)
    chosen_N = torch.where(
        advantage_N >= 0, torch.minimum(log_ratio_N, clipped_N), torch.maximum(log_ratio_N, clipped_N)
    )
    return -advantage_N * ratio(seq_mean(chosen_N, seq_N, sequences))[seq_N]


# --- further terms and weights of tokens ----------------------------------------------------------------------------


def k3(*, logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """`exp(q) - q - 1` with `q = log ref - log pi`, [N] -> [N]: an estimate of KL(pi || ref) that is never negative.
    The exponential is bounded as in `ratio`.

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
    """1 for the tokens of kept sequences, else 0, [N] -> [N]. A sequence is kept if its advantage is not negative or
    its mean `log old - log pi` is at most the threshold. DeepSeek-V3.2, arXiv:2512.02556, equation 9."""
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
    """The importance weight for a sampler whose log-probs differ from the trainer's, [N] -> [N], without a gradient.

    `mode` is a level and a kind. The level is `token`, `sequence` (the sum of log-ratios) or `geometric` (their mean).
    The kind sets ratios outside `[low, high]` to the bound (`truncate`) or to 0 (`mask`). Without `high`, a weight is
    at most `exp(MAX_LOG_RATIO)`.
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
    """The quantile `share`, interpolated linearly, [N] -> scalar: as `torch.quantile`, which refuses more than 2^24
    values."""
    order_N = values_N.sort().values
    place = share * (len(order_N) - 1)
    below = min(math.floor(place), max(len(order_N) - 2, 0))
    return torch.lerp(order_N[below], order_N[min(below + 1, len(order_N) - 1)], place - below)


def high_entropy(entropy_N: Tensor, *, threshold: Tensor) -> Tensor:
    """1 for tokens whose entropy is at least the threshold, else 0, [N] -> [N]: "Beyond the 80/20 rule", Wang et al.
    2025, arXiv:2506.01939."""
    return (entropy_N >= threshold).to(entropy_N.dtype)


# --- reductions -----------------------------------------------------------------------------------------------------

# The denominator of a sum, counted over the whole optimizer step.
SEQUENCES, TOKENS, BUDGET = "sequences", "tokens", "budget"


def by_sequence(loss_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """The sum over sequences of the mean over tokens, [N] -> scalar; its denominator is the number of sequences."""
    return seq_mean(loss_N, seq_N, sequences).sum()


def by_token(loss_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """The sum over tokens, [N] -> scalar."""
    return loss_N.sum()


class Bounds(NamedTuple):
    """The bounds at which a surrogate clips the ratio."""

    low: float
    high: float


def ratio_bounds(epsilon: float, epsilon_high: float) -> Bounds:
    return Bounds(1 - epsilon, 1 + epsilon_high)


def log_ratio_bounds(epsilon: float, epsilon_high: float) -> Bounds:
    return Bounds(math.exp(-epsilon), math.exp(epsilon_high))


def upper_bound(epsilon: float, epsilon_high: float) -> Bounds:
    return Bounds(0.0, epsilon_high)


class PolicyLoss(NamedTuple):
    """A policy-gradient loss.

    surrogate      the loss of each token, [N]; its parameters name the values that it reads
    add_up         the sum of the token losses, (loss_N, seq_N, sequences) -> scalar
    divide_by      the denominator of that sum, counted over the optimizer step
    bounds         the clipping bounds, from (epsilon, epsilon_high), for the clip metrics; None: no clipping
    reads_tokens   the surrogate reads the ratio of each token, whatever `importance_sampling_level` is
    metrics        names and functions that give [N]; the mean over sequences is logged
    """

    surrogate: Callable[..., Tensor]
    add_up: Callable[[Tensor, Tensor, int], Tensor] = by_token
    divide_by: str = TOKENS
    bounds: Callable[[float, float], Bounds] | None = None
    reads_tokens: bool = False
    metrics: tuple[tuple[str, Callable[..., Tensor]], ...] = ()

    @property
    def corrects_itself(self) -> bool:
        """Whether the surrogate itself applies the weight that corrects for another sampler."""
        return "log_correction_N" in inspect.signature(self.surrogate).parameters


POLICY_LOSSES: dict[str, PolicyLoss] = {
    # Shao et al. 2024, arXiv:2402.03300, equation 3: mean over tokens, then over sequences.
    "grpo": PolicyLoss(clip, by_sequence, SEQUENCES, ratio_bounds),
    # Mean over tokens. Upstream takes it over a micro-batch, we over the step; so it equals dapo.
    "bnpo": PolicyLoss(clip, by_token, TOKENS, ratio_bounds),
    # Liu et al. 2025, arXiv:2503.20783: the denominator is sequences × max_completion_length, whatever their lengths.
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
