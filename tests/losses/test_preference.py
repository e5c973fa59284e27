"""Losses of pairs: hand-worked values, float64 gradient checks, limits, and sorted losses under any split of a step."""

import inspect
import math

import pytest
import torch
from torch import Tensor

from trl.losses.preference import DIVERGENCES, DIVERGING, LOSSES, NEED_STEP, PER_TOKEN, StepPairs, ld, wpo_weight

LOG2, LOG3 = math.log(2), math.log(3)  # the logistic function of log 3 is 3/4, of -log 3 it is 1/4
LOGP = ("chosen_logp_P", "rejected_logp_P")
REF = ("chosen_ref_logp_P", "rejected_ref_logp_P")
SETTINGS = {"beta": 0.4, "label_smoothing": 0.2, "discopop_tau": 0.5, "f_alpha_divergence_coef": 0.5}


def available(policy_P2: Tensor, ref_P2: Tensor, tokens_P2: Tensor, divergence: str = "reverse_kl", **settings):
    """All that a loss may ask for, from log-probs and token counts of chosen and rejected completions."""
    settings = {**SETTINGS, **settings}
    found = {"step": None, **settings}
    for index, side in enumerate(("chosen", "rejected")):
        logratio_P = policy_P2[:, index] - ref_P2[:, index]
        found |= {
            f"{side}_logp_P": policy_P2[:, index],
            f"{side}_ref_logp_P": ref_P2[:, index],
            f"{side}_logratio_P": logratio_P,
            f"{side}_score_P": call(DIVERGENCES[divergence], {"logratio_P": logratio_P, **settings}),
            f"{side}_tokens_P": tokens_P2[:, index],
            f"{side}_nll_P": -policy_P2[:, index],
        }
    return found


def call(function, given):
    return function(**{name: given[name] for name in inspect.signature(function).parameters})


def drawn(pairs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, ref = (-20 * torch.rand(pairs, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    return policy, ref, torch.randint(1, 9, (pairs, 2), generator=generator).double()


# Two pairs. In the first the log-ratios are log 3 and 0, in the second 0 and log 3; 2 and 4 tokens.
GOLDEN = {
    "sigmoid": ({"beta": 1, "label_smoothing": 0.0}, [math.log(4 / 3), math.log(4)]),
    "sigmoid, conservative": (
        {"beta": 1, "label_smoothing": 0.1},
        [0.9 * math.log(4 / 3) + 0.1 * math.log(4), 0.9 * math.log(4) + 0.1 * math.log(4 / 3)],
    ),
    "hinge": ({"beta": 1}, [0.0, 1 + LOG3]),
    "hinge, inside": ({"beta": 0.5}, [1 - LOG3 / 2, 1 + LOG3 / 2]),
    "ipo": ({"beta": 0.5}, [(LOG3 / 2 - 1) ** 2, (LOG3 / 4 + 1) ** 2]),
    # The policy's preference is (3/4, 1/4), just what the labels say, and (1/4, 3/4).
    "exo_pair": ({"beta": 1, "label_smoothing": 0.25}, [0.0, LOG3 / 2]),
    "nca_pair": ({"beta": 1}, [math.log(4 / 3) + LOG2 + LOG2 / 2, LOG2 + LOG2 / 2 + LOG2]),
    "robust": (
        {"beta": 1, "label_smoothing": 0.25},
        [
            (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5,
            (0.75 * math.log(4) - 0.25 * math.log(4 / 3)) / 0.5,
        ],
    ),
    "bco_pair": ({"beta": 1}, [math.log(4 / 3) + LOG2, LOG2 + math.log(4)]),
    "sppo_hard": ({"beta": 0.5}, [(LOG3 - 1) ** 2 + 1, 1 + (LOG3 + 1) ** 2]),
    "apo_zero": ({"beta": 1}, [1 / 4 + 1 / 2, 1 / 2 + 3 / 4]),
    "apo_down": ({"beta": 1}, [3 / 4 + 1 / 4, 1 / 2 + 3 / 4]),
    "discopop": (
        {"beta": 1, "discopop_tau": 1.0},
        [math.log(4 / 3) / 4 + 3 / 4 * 1 / 3, math.log(4) * 3 / 4 + 1 / 4 * 3],
    ),
    # Per token log 3 / 2 and -log 3 / 4, times beta log 3 and -log 3 / 2.
    "sigmoid_norm": ({"beta": 2}, [math.log(4 / 3), math.log(1 + math.sqrt(3))]),
    "sft": ({}, [-(LOG3 - 5.0), 5.0]),
    # Sorted, chosen and rejected log-ratios are the same: every match is even, while no pair is. For `aot` see below.
    "aot_unpaired": ({"beta": 1, "label_smoothing": 0.0}, [LOG2, LOG2]),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_known_values(case):
    settings, expected = GOLDEN[case]
    ref = torch.tensor([[-5.0, -4.0], [-5.0, -6.0]], dtype=torch.float64)
    ratio = torch.tensor([[LOG3, 0.0], [0.0, LOG3]], dtype=torch.float64)
    tokens = torch.tensor([[2.0, 4.0], [2.0, 4.0]], dtype=torch.float64)
    loss_P = call(LOSSES[case.split(",")[0]], available(ref + ratio, ref, tokens, **settings))
    torch.testing.assert_close(loss_P, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "settings", "at_three"),
    [
        ("reverse_kl", {}, LOG3),
        ("forward_kl", {}, 1 - 1 / 3),
        ("js_divergence", {}, math.log(2 * 3 / (3 + 1))),
        ("alpha_divergence", {"f_alpha_divergence_coef": 0.5}, 2 - 2 / math.sqrt(3)),
        ("alpha_divergence", {"f_alpha_divergence_coef": 2.0}, 3 - 1),
        ("alpha_divergence", {"f_alpha_divergence_coef": 0.0}, 1 - 1 / 3),  # forward KL
        ("alpha_divergence", {"f_alpha_divergence_coef": 1.0}, LOG3),  # reverse KL
    ],
)
def test_divergences_at_three(name, settings, at_three):
    """Values of f' at a likelihood ratio of 3 and of 1, where all of them are zero."""
    logratio_P = torch.tensor([LOG3, 0.0], dtype=torch.float64)
    score_P = call(DIVERGENCES[name], {"logratio_P": logratio_P, **SETTINGS, **settings})
    torch.testing.assert_close(score_P, torch.tensor([at_three, 0.0], dtype=torch.float64))


def test_alpha_divergence_tends_to_reverse_kl():
    """exp(x) - 1 taken as such would have lost all but three digits here."""
    logratio_P = torch.tensor([-7.0, 0.5, 20.0])
    score_P = DIVERGENCES["alpha_divergence"](logratio_P=logratio_P, f_alpha_divergence_coef=1 - 2e-6)
    torch.testing.assert_close(score_P, logratio_P, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "alpha_divergence"])
def test_scores_keep_their_digits_near_the_reference(name):
    """All of them are the log-ratio to first order; at the first steps that is all there is."""
    logratio_P = torch.tensor([1e-6, -1e-6])
    score_P = call(DIVERGENCES[name], {"logratio_P": logratio_P, **SETTINGS})
    torch.testing.assert_close(score_P, logratio_P, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("coefficient", [0.5, 3.0])
def test_scores_of_far_log_ratios_are_finite(name, coefficient):
    logratio_P = torch.tensor([-500.0, 500.0], requires_grad=True)
    score_P = call(DIVERGENCES[name], {"logratio_P": logratio_P, "f_alpha_divergence_coef": coefficient})
    score_P.sum().backward()
    assert score_P.isfinite().all() and logratio_P.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_far_apart_pairs_have_finite_losses_and_gradients(name):
    policy = torch.tensor([[-900.0, -1.0], [-1.0, -900.0]], requires_grad=True)
    given = available(policy, torch.full((2, 2), -300.0), torch.ones(2, 2), beta=1.0)
    loss_P = call(LOSSES[name], given)
    loss_P.sum().backward()
    assert loss_P.isfinite().all() and policy.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NEED_STEP))
def test_gradients_in_float64(name):
    policy, ref, tokens = drawn(4)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(LOSSES[name], available(x, ref, tokens)), (policy,))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", sorted(DIVERGING))
def test_gradients_through_divergences_in_float64(divergence, name):
    policy, ref, tokens = drawn(3)
    policy, ref = policy / 5, ref / 5
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(LOSSES[name], available(x, ref, tokens, divergence)), (policy,))


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_have_no_loss(name):
    policy = torch.zeros(0, 2, requires_grad=True)
    loss_P = call(LOSSES[name], available(policy, torch.zeros(0, 2), torch.zeros(0, 2)))
    loss_P.sum().backward()
    assert loss_P.shape == (0,) and policy.grad.shape == (0, 2)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NEED_STEP))
def test_a_pair_does_not_see_its_neighbours(name):
    policy, ref, tokens = drawn(5)
    together = call(LOSSES[name], available(policy, ref, tokens))
    one_by_one = [call(LOSSES[name], available(*(x[i : i + 1] for x in (policy, ref, tokens)))) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(one_by_one))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_move_with_their_pairs(name):
    policy, ref, tokens = drawn(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss_P = call(LOSSES[name], available(policy, ref, tokens))
    moved_P = call(LOSSES[name], available(policy[order], ref[order], tokens[order]))
    torch.testing.assert_close(moved_P, loss_P[order])


@pytest.mark.parametrize(
    ("name", "at_zero"),
    [
        ("sigmoid", LOG2),
        ("sigmoid_norm", LOG2),
        ("hinge", 1.0),
        ("nca_pair", 2 * LOG2),
        ("robust", LOG2),
        ("bco_pair", 2 * LOG2),
        ("aot", LOG2),
        ("aot_unpaired", LOG2),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", LOG2 / 2 + 1 / 2),
    ],
)
def test_without_beta_all_pairs_are_even(name, at_zero):
    policy, ref, tokens = drawn(4)
    loss_P = call(LOSSES[name], available(policy, ref, tokens, beta=0.0))
    torch.testing.assert_close(loss_P, torch.full_like(loss_P, at_zero))


def test_discopop_stays_finite_where_its_exponential_would_not():
    """With a tau of 2 and x = -1,000 the exponent is 500: the tangent at 80 is at 421 exp(80)."""
    logit_P = torch.tensor([-1000.0], requires_grad=True)
    zero_P = torch.zeros(1)
    loss_P = LOSSES["discopop"](chosen_score_P=logit_P, rejected_score_P=zero_P, beta=1.0, discopop_tau=2.0)
    assert loss_P.item() == pytest.approx(421 * math.exp(80), rel=1e-5)
    loss_P.sum().backward()
    assert logit_P.grad.isfinite().all() and logit_P.grad < 0


def test_labels_wrong_half_the_time_teach_nothing_to_exo():
    """Against labels of (1/2, 1/2) the divergence of (3/4, 1/4) is log 2 less the entropy, whichever way round."""
    policy, ref = torch.tensor([[LOG3, 0.0], [0.0, LOG3]], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    loss_P = call(LOSSES["exo_pair"], available(policy, ref, ref + 1, beta=1, label_smoothing=0.5))
    entropy = 3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4)
    torch.testing.assert_close(loss_P, torch.full_like(loss_P, LOG2 - entropy))


def test_robust_is_unbiased():
    """Labels of which a share e is wrong: the mean of the robust loss is the loss of the right labels."""
    policy, ref, tokens = drawn(5)
    right = call(LOSSES["robust"], available(policy, ref, tokens, label_smoothing=0.3))
    wrong = call(LOSSES["robust"], available(policy.flip(1), ref.flip(1), tokens, label_smoothing=0.3))
    clean = call(LOSSES["sigmoid"], available(policy, ref, tokens, label_smoothing=0.0))
    torch.testing.assert_close(0.7 * right + 0.3 * wrong, clean)


# --- sorted losses ----------------------------------------------------------------------------------------------------


def test_aot_of_known_margins():
    """The policy's margins are log 9 and 0, the reference's 0 and log 3. Sorted: 0 beside 0, log 9 beside log 3."""
    policy = torch.tensor([[math.log(9), 0.0], [2.0, 2.0]], dtype=torch.float64)
    ref = torch.tensor([[1.0, 1.0], [LOG3, 0.0]], dtype=torch.float64)
    loss_P = call(LOSSES["aot"], available(policy, ref, ref, beta=1, label_smoothing=0.0))
    torch.testing.assert_close(loss_P, torch.tensor([math.log(4 / 3), LOG2], dtype=torch.float64))


def test_aot_unpaired_of_known_log_ratios():
    """Chosen log 9 and 0, rejected 0 and log 3: the same two matches, of which both pairs have a half each."""
    policy = torch.tensor([[math.log(9), 0.0], [0.0, LOG3]], dtype=torch.float64)
    loss_P = call(LOSSES["aot_unpaired"], available(policy, policy * 0, policy, beta=1, label_smoothing=0.0))
    half = (math.log(4 / 3) + LOG2) / 2
    torch.testing.assert_close(loss_P, torch.tensor([half, half], dtype=torch.float64))


def plainly_sorted(name: str, policy: Tensor, ref: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The loss as the paper has it, on all pairs at once, with the gradient through both sides of each match."""
    if name == "aot":
        better, worse = (x[:, 0] - x[:, 1] for x in (policy, ref))
    else:
        better, worse = (policy - ref).unbind(1)
    delta_P = beta * (better.sort().values - worse.sort().values)
    smooth = label_smoothing
    return ((1 - smooth) * torch.log1p(torch.exp(-delta_P)) + smooth * torch.log1p(torch.exp(delta_P))).sum()


SPLITS = [[7], [1] * 7, [3, 4], [5, 0, 2], [2, 2, 2, 1], [0, 6, 1]]


@pytest.mark.parametrize("name", sorted(NEED_STEP))
@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("ties", [False, True])
def test_sorted_losses_do_not_depend_on_the_split(name, sizes, ties):
    policy, ref, tokens = drawn(7)
    if ties:  # equal margins and log-ratios, within and across micro-batches
        policy, ref = policy.round(decimals=-1), ref.round(decimals=-1)
    policy.requires_grad_()
    whole = plainly_sorted(name, policy, ref, SETTINGS["beta"], SETTINGS["label_smoothing"])
    (expected,) = torch.autograd.grad(whole, policy)
    if ties:
        # Which of two equals is matched with whom is open: the total gradient is not, nor is the value.
        expected = expected.sum()

    step = StepPairs(*(x[:, side].detach() for x in (policy, ref) for side in (0, 1)))
    total, start = 0.0, 0
    for size in sizes:
        given = available(*(x[start : start + size] for x in (policy, ref, tokens)))
        given["step"] = step._replace(offset=start)
        total = total + call(LOSSES[name], given).sum()
        start += size
    (found,) = torch.autograd.grad(total, policy)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(found.sum() if ties else found, expected)


@pytest.mark.parametrize("name", sorted(NEED_STEP))
def test_ties_are_matched_alike_under_any_split(name):
    policy, ref, tokens = drawn(7)
    policy, ref = policy.round(decimals=-1).requires_grad_(), ref.round(decimals=-1)
    step = StepPairs(*(x[:, side].detach() for x in (policy, ref) for side in (0, 1)))
    found = []
    for sizes in SPLITS:
        parts, start = [], 0
        for size in sizes:
            given = available(*(x[start : start + size] for x in (policy, ref, tokens)))
            given["step"] = step._replace(offset=start)
            parts.append(call(LOSSES[name], given))
            start += size
        loss_P = torch.cat(parts)
        found.append((loss_P, torch.autograd.grad(loss_P.sum(), policy)[0]))
    for loss_P, grad in found[1:]:
        assert torch.equal(loss_P, found[0][0])
        torch.testing.assert_close(grad, found[0][1])


@pytest.mark.parametrize("name", sorted(NEED_STEP))
def test_a_batch_alone_is_a_whole_step(name):
    policy, ref, tokens = drawn(7)
    step = StepPairs(*(x[:, side] for x in (policy, ref) for side in (0, 1)))
    alone = call(LOSSES[name], available(policy, ref, tokens))
    torch.testing.assert_close(alone, call(LOSSES[name], {**available(policy, ref, tokens), "step": step}))


@pytest.mark.parametrize("name", sorted(NEED_STEP))
def test_one_pair_is_compared_with_its_own_reference(name):
    policy, ref, tokens = drawn(1)
    given = available(policy, ref, tokens)
    torch.testing.assert_close(call(LOSSES[name], given), call(LOSSES["sigmoid"], given))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_ld_weighs_what_is_longer_than_the_other():
    """Lengths 3 and 1, then 2 and 2: the second and third token of the first completion are beyond the other's end."""
    logp_N = -torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 3.0, 3.0])
    seq_N = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    assert ld(logp_N, seq_N=seq_N, sequences=4, ld_alpha=0.5).tolist() == [-4.0, -8.0, -2.0, -6.0]
    assert ld(logp_N, seq_N=seq_N, sequences=4, ld_alpha=0.0).tolist() == [-1.0, -8.0, -2.0, -6.0]
    assert ld(logp_N, seq_N=seq_N, sequences=4, ld_alpha=1.0).tolist() == [-7.0, -8.0, -2.0, -6.0]


def test_ld_with_an_empty_completion_and_with_none():
    logp_N, seq_N = -torch.tensor([1.0, 2.0]), torch.tensor([1, 1])
    assert ld(logp_N, seq_N=seq_N, sequences=2, ld_alpha=0.25).tolist() == [0.0, -0.75]
    assert ld(logp_N[:0], seq_N=seq_N[:0], sequences=0, ld_alpha=0.25).shape == (0,)


def test_ld_in_float64():
    logp_N = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seq_N = torch.tensor([0, 0, 0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda x: ld(x, seq_N=seq_N, sequences=2, ld_alpha=0.3), (logp_N,))


def test_wpo_weight_of_known_probabilities():
    """Chosen: p = 1/2 against sum p^2 = 1/8, and 1/4 against 1/4: 4 and 1, a geometric mean of 2. Rejected: 1/4
    against 3/4, a third."""
    logp_N = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log().requires_grad_()
    sum_sq_N = torch.tensor([1 / 8, 1 / 4, 3 / 4], requires_grad=True)
    weight_P = wpo_weight(logp_N, sum_sq_N, seq_N=torch.tensor([0, 0, 1]), sequences=2)
    torch.testing.assert_close(weight_P, torch.tensor([2 / 3]))
    assert not weight_P.requires_grad


def test_wpo_weight_of_a_uniform_policy_is_one():
    """Where every token has probability 1/V, so has the policy's own draw."""
    weight_P = wpo_weight(
        torch.full((5,), 1 / 8).log(), torch.full((5,), 1 / 8), seq_N=torch.tensor([0, 0, 1, 2, 3]), sequences=4
    )
    torch.testing.assert_close(weight_P, torch.ones(2))


# --- what exists ------------------------------------------------------------------------------------------------------


def test_what_exists_is_named():
    names = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop"
    assert set(LOSSES) == {*names.split(), "sft", "sigmoid_norm"}
    assert set(DIVERGENCES) == {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}
    assert PER_TOKEN == {"sft"} and NEED_STEP == {"aot", "aot_unpaired"}
    assert DIVERGING == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


@pytest.mark.parametrize("function", [*LOSSES.values(), *DIVERGENCES.values()])
def test_arguments_are_named_and_explained(function):
    parameters = inspect.signature(function).parameters.values()
    assert {each.kind for each in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert function.__doc__
