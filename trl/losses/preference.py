"""Losses on pairs of completions of one prompt: direct preference optimisation and its family.

`N` trained tokens, `S` sequences (2P: chosen and rejected in turn), `P` pairs. Log-probs are summed over a completion's
tokens; a log-ratio is the policy's log-prob minus the reference's. Every loss names the numbers and settings it needs
as keyword-only arguments, and gives one number per pair, [P]. In the docstrings `s` is the logistic function, `d` the
chosen minus the rejected score, `w` and `l` are the log-ratios of the chosen and the rejected completion.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import bounded_exp, position, seq_mean, seq_sum


class StepPairs(NamedTuple):
    """The pairs of a whole optimizer step, on all ranks, for losses that compare pairs with each other. Computed before
    the step, without gradients, [P] each; `offset` is the position of this batch's first pair."""

    chosen_logp_P: Tensor
    rejected_logp_P: Tensor
    chosen_ref_logp_P: Tensor
    rejected_ref_logp_P: Tensor
    offset: int = 0


# --- f-divergences: the replacement of the log-ratio ---------------------------------------------------------------


def reverse_kl(*, logratio_P: Tensor) -> Tensor:
    """`f'(u) = log u + 1` with `u = pi / ref`, without the constant: the log-ratio itself, [P] -> [P]. f-DPO, Wang et
    al. 2023, arXiv:2309.16240, table 1."""
    return logratio_P


def forward_kl(*, logratio_P: Tensor) -> Tensor:
    """`f'(u) = -1/u`, here `1 - 1/u`, [P] -> [P]. The exponent is bounded by 80, to stay finite. arXiv:2309.16240,
    table 1."""
    return -torch.expm1((-logratio_P).clamp(max=80.0))


def js_divergence(*, logratio_P: Tensor) -> Tensor:
    """`f'(u) = log(2u / (1 + u))`, [P] -> [P]. arXiv:2309.16240, table 1."""
    return math.log(2) + F.logsigmoid(logratio_P)


def alpha_divergence(*, logratio_P: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """`f'(u) = (u^(a-1) - 1) / (a - 1)` with `a = f_alpha_divergence_coef`, [P] -> [P]; the log-ratio at a = 1. The
    exponent is bounded by 80, to stay finite. arXiv:2309.16240, table 1, whose alpha is `1 - a`."""
    power = f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:
        return logratio_P
    return torch.expm1((power * logratio_P).clamp(max=80.0)) / power


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


# --- losses --------------------------------------------------------------------------------------------------------


def sigmoid(*, chosen_score_P: Tensor, rejected_score_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`-(1 - e) log s(beta d) - e log s(-beta d)` with `d = chosen - rejected score`, `e = label_smoothing`, -> [P].

    DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7; conservative (cDPO) with e > 0.
    """
    return _smoothed(beta * (chosen_score_P - rejected_score_P), label_smoothing)


def _smoothed(logit_P: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of a preference whose label is wrong with probability `label_smoothing`."""
    return -(1 - label_smoothing) * F.logsigmoid(logit_P) - label_smoothing * F.logsigmoid(-logit_P)


def hinge(*, chosen_score_P: Tensor, rejected_score_P: Tensor, beta: float) -> Tensor:
    """`max(0, 1 - beta d)`, -> [P]. SLiC, Zhao et al. 2023, arXiv:2305.10425; of log-ratios in RSO, Liu et al. 2023,
    arXiv:2309.06657."""
    return torch.relu(1 - beta * (chosen_score_P - rejected_score_P))


def ipo(
    *,
    chosen_score_P: Tensor,
    rejected_score_P: Tensor,
    chosen_tokens_P: Tensor,
    rejected_tokens_P: Tensor,
    beta: float,
) -> Tensor:
    """`(d - 1 / (2 beta))^2` where `d` is the difference of the scores per token, -> [P].

    Azar et al. 2023, arXiv:2310.12036, equation 17 (beta is their tau). The mean over tokens is what the authors used.
    """
    chosen_P = chosen_score_P / chosen_tokens_P.clamp(min=1)
    rejected_P = rejected_score_P / rejected_tokens_P.clamp(min=1)
    return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2


def exo_pair(*, chosen_score_P: Tensor, rejected_score_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """`KL(q || p)` of `q = (s(beta d), s(-beta d))` and `p = (1 - e, e)`, `e = label_smoothing` > 0, -> [P].

    EXO, Ji et al. 2024, arXiv:2402.00856, equation 16.
    """
    logit_P = beta * (chosen_score_P - rejected_score_P)
    win_P, lose_P = F.logsigmoid(logit_P), F.logsigmoid(-logit_P)
    log_win, log_lose = math.log1p(-label_smoothing), math.log(label_smoothing)
    return win_P.exp() * (win_P - log_win) + lose_P.exp() * (lose_P - log_lose)


def nca_pair(*, chosen_logratio_P: Tensor, rejected_logratio_P: Tensor, beta: float) -> Tensor:
    """`-log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2` with rewards `r = beta log-ratio`, -> [P].

    NCA for pairs, Chen et al. 2024, arXiv:2402.05369.
    """
    chosen_P, rejected_P = beta * chosen_logratio_P, beta * rejected_logratio_P
    return -F.logsigmoid(chosen_P) - 0.5 * (F.logsigmoid(-chosen_P) + F.logsigmoid(-rejected_P))


def robust(*, chosen_score_P: Tensor, rejected_score_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """`(-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2e)`, `e = label_smoothing` < 1/2, -> [P]: unbiased when a
    share e of the preferences is flipped. Chowdhury et al. 2024, arXiv:2403.00409."""
    logit_P = beta * (chosen_score_P - rejected_score_P)
    right_P, flipped_P = -F.logsigmoid(logit_P), -F.logsigmoid(-logit_P)
    return ((1 - label_smoothing) * right_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def bco_pair(*, chosen_logratio_P: Tensor, rejected_logratio_P: Tensor, beta: float) -> Tensor:
    """`-log s(beta w) - log s(-beta l)` of the two log-ratios, -> [P]: BCO without its shift. Jung et al. 2024,
    arXiv:2404.04656."""
    return -F.logsigmoid(beta * chosen_logratio_P) - F.logsigmoid(-beta * rejected_logratio_P)


def sppo_hard(*, chosen_logratio_P: Tensor, rejected_logratio_P: Tensor, beta: float) -> Tensor:
    """`(w - 1/(2 beta))^2 + (l + 1/(2 beta))^2` of the two log-ratios, -> [P].

    SPPO, Wu et al. 2024, arXiv:2405.00675, equation 4.7 with the winner's probability 1 and the loser's 0.
    """
    half = 0.5 / beta
    return (chosen_logratio_P - half) ** 2 + (rejected_logratio_P + half) ** 2


def aot(
    *,
    chosen_logp_P: Tensor,
    rejected_logp_P: Tensor,
    chosen_ref_logp_P: Tensor,
    rejected_ref_logp_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    step: StepPairs | None = None,
) -> Tensor:
    """`-log s(beta (a_(k) - b_(k)))`, -> [P]; smoothed as in `sigmoid`. `a = log pi_w - log pi_l` is the difference of
    a pair under the policy, `b` under the reference. Each is sorted over the step, and equal ranks are matched.

    AOT for pairs, Melnyk et al. 2024, arXiv:2406.05882.
    """
    step = step or StepPairs(chosen_logp_P.detach(), rejected_logp_P.detach(), chosen_ref_logp_P, rejected_ref_logp_P)
    policy_P = step.chosen_logp_P - step.rejected_logp_P
    ref_P = step.chosen_ref_logp_P - step.rejected_ref_logp_P
    partner_P = _partners(policy_P, ref_P)[step.offset : step.offset + len(chosen_logp_P)]
    return _smoothed(beta * (chosen_logp_P - rejected_logp_P - partner_P), label_smoothing)


def aot_unpaired(
    *,
    chosen_logp_P: Tensor,
    rejected_logp_P: Tensor,
    chosen_ref_logp_P: Tensor,
    rejected_ref_logp_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    step: StepPairs | None = None,
) -> Tensor:
    """`-log s(beta (w_(k) - l_(k)))`, -> [P]; smoothed as in `sigmoid`. Chosen and rejected log-ratios are each sorted
    over the optimizer step, and equal ranks are matched. AOT unpaired, arXiv:2406.05882.

    The two log-ratios of a pair belong to two matches. The pair gets half the value of each, and its own full gradient.
    """
    step = step or StepPairs(chosen_logp_P.detach(), rejected_logp_P.detach(), chosen_ref_logp_P, rejected_ref_logp_P)
    chosen_all = step.chosen_logp_P - step.chosen_ref_logp_P
    rejected_all = step.rejected_logp_P - step.rejected_ref_logp_P
    here = slice(step.offset, step.offset + len(chosen_logp_P))
    facing_chosen = _partners(chosen_all, rejected_all)[here]
    facing_rejected = _partners(rejected_all, chosen_all)[here]
    chosen_P = _smoothed(beta * (chosen_logp_P - chosen_ref_logp_P - facing_chosen), label_smoothing)
    rejected_P = _smoothed(beta * (facing_rejected - rejected_logp_P + rejected_ref_logp_P), label_smoothing)
    both_P = chosen_P + rejected_P
    return both_P - both_P.detach() / 2


def _partners(values_P: Tensor, others_P: Tensor) -> Tensor:
    """For each value, the one of `others_P` with the same rank in sorted order, [P]."""
    order = values_P.argsort(stable=True)
    return torch.empty_like(others_P).index_copy(0, order, others_P.sort(stable=True).values)


def apo_zero(*, chosen_logratio_P: Tensor, rejected_logratio_P: Tensor, beta: float) -> Tensor:
    """`1 - s(beta w) + s(beta l)` of the two log-ratios, -> [P]: chosen up, rejected down. D'Oosterlinck et al. 2024,
    arXiv:2408.06266, equation 7."""
    return 1 - torch.sigmoid(beta * chosen_logratio_P) + torch.sigmoid(beta * rejected_logratio_P)


def apo_down(*, chosen_logratio_P: Tensor, rejected_logratio_P: Tensor, beta: float) -> Tensor:
    """`s(beta w) + 1 - s(beta (w - l))` of the two log-ratios, -> [P]: both down, rejected more. arXiv:2408.06266,
    equation 8."""
    gap_P = chosen_logratio_P - rejected_logratio_P
    return torch.sigmoid(beta * chosen_logratio_P) + 1 - torch.sigmoid(beta * gap_P)


def discopop(*, chosen_score_P: Tensor, rejected_score_P: Tensor, beta: float, discopop_tau: float) -> Tensor:
    """`(1 - m) (-log s(x)) + m exp(-x)` with `x = beta d`, `m = s(x / tau)`, -> [P]. DiscoPOP, Lu et al. 2024,
    arXiv:2406.08414, equation 5. Of a tau above 1, `exp` follows its tangent where its exponent is above 80."""
    logit_P = beta * (chosen_score_P - rejected_score_P)
    # m exp(-x) as one exponential: far below zero m vanishes, which would meet an infinite exp(-x).
    mixed_exp_P = bounded_exp(F.logsigmoid(logit_P / discopop_tau) - logit_P, 80.0)
    return mixed_exp_P - torch.sigmoid(-logit_P / discopop_tau) * F.logsigmoid(logit_P)


def sft(*, chosen_nll_P: Tensor) -> Tensor:
    """The chosen completion's negative log-likelihood, summed over its tokens, -> [P]. To be averaged over tokens.

    Added to `sigmoid` it is RPO (Pang et al. 2024, arXiv:2404.19733) and a part of MPO (Wang et al. 2024,
    arXiv:2411.10442).
    """
    return chosen_nll_P


def sigmoid_norm(
    *,
    chosen_score_P: Tensor,
    rejected_score_P: Tensor,
    chosen_tokens_P: Tensor,
    rejected_tokens_P: Tensor,
    beta: float,
) -> Tensor:
    """`-log s(beta d)` where `d` is the difference of the scores per token, -> [P].

    Length-normalised DPO, Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, equation 6.
    """
    chosen_P = chosen_score_P / chosen_tokens_P.clamp(min=1)
    rejected_P = rejected_score_P / rejected_tokens_P.clamp(min=1)
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


# --- weights of tokens and pairs -----------------------------------------------------------------------------------


def ld(logp_N: Tensor, *, seq_N: Tensor, sequences: int, ld_alpha: float) -> Tensor:
    """Log-probs of completions; tokens beyond the length of the pair's shorter completion have weight `ld_alpha`,
    [N] -> [S].

    LD-DPO, Liu et al. 2024, arXiv:2409.06411. The tokens of a sequence must be consecutive and in order.
    """
    length_S = seq_sum(torch.ones_like(logp_N), seq_N, sequences)
    shared_S = length_S.view(-1, 2).amin(1).repeat_interleave(2)
    shared_N = position(seq_N, sequences) < shared_S[seq_N]
    return seq_sum(torch.where(shared_N, logp_N, ld_alpha * logp_N), seq_N, sequences)


def wpo_weight(logp_N: Tensor, sum_sq_N: Tensor, *, seq_N: Tensor, sequences: int) -> Tensor:
    """The likelihood of each pair under the policy, [N] -> [P], without gradient: the product over its completions of
    `exp(mean_t(log p_t - log sum_v p_t(v)^2))`. WPO, Zhou et al. 2024, arXiv:2406.11827, equation 2 with aligned
    weights."""
    aligned_N = logp_N.detach() - sum_sq_N.detach().log()
    return seq_mean(aligned_N, seq_N, sequences).exp().view(-1, 2).prod(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
}
# Losses averaged over the chosen tokens of the optimizer step, not over its pairs.
PER_TOKEN = frozenset({"sft"})
# Losses that compare the pairs of the whole optimizer step with each other.
NEED_STEP = frozenset({"aot", "aot_unpaired"})
# Losses of score differences (or of no scores), so that the constant of a divergence other than reverse KL cancels.
DIVERGING = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
