"""Policy losses: hand-worked values, float64 gradient checks, limits, permutation, nothing."""

import inspect
import math

import pytest
import torch

from trl.losses.policy import (
    BUDGET,
    MAX_LOG_RATIO,
    POLICY_LOSSES,
    SEQUENCES,
    TOKENS,
    by_sequence,
    by_token,
    cispo,
    clip,
    correction,
    gmpo,
    high_entropy,
    k3,
    off_policy_keep,
    pool,
    quantile,
    ratio,
    ratio_bounds,
    sapo,
    vespo,
    vespo_weight,
)

LOG2, LOG3 = math.log(2), math.log(3)
SETTINGS = {
    "epsilon": 0.2,
    "epsilon_high": 0.3,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
LEVELS = ("token", "sequence", "sequence_token")


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(tokens: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def surrogate(name: str, logp_N, old_N, advantage_N, seq_N, sequences: int, level: str = "token", **settings):
    """A method's losses of tokens, as a trainer asks for them."""
    log_ratio_N = logp_N - old_N
    pooled_N = pool(log_ratio_N, seq_N=seq_N, sequences=sequences, importance_sampling_level=level)
    given = {
        "log_ratio_N": log_ratio_N,
        "ratio_N": ratio(pooled_N),
        "logp_N": logp_N,
        "advantage_N": advantage_N,
        "seq_N": seq_N,
        "sequences": sequences,
        **SETTINGS,
        **settings,
    }
    function = POLICY_LOSSES[name].surrogate
    return function(**{each: given[each] for each in inspect.signature(function).parameters if each in given})


# --- the ratio --------------------------------------------------------------------------------------------------------

# A sequence of two tokens and one of one; the first's log-ratios have mean 0.2.
SEQ_N = torch.tensor([0, 0, 1])
LOG_RATIO_N = double(0.1, 0.3, -0.5)
POOLED = {"token": [0.1, 0.3, -0.5], "sequence": [0.2, 0.2, -0.5], "sequence_token": [0.2, 0.2, -0.5]}
# Of the first token's value with respect to all log-ratios, and of the sum of all with respect to each.
OF_THE_FIRST = {"token": [1, 0, 0], "sequence": [0.5, 0.5, 0], "sequence_token": [1, 0, 0]}


@pytest.mark.parametrize("level", LEVELS)
def test_pooled(level):
    log_ratio_N = LOG_RATIO_N.clone().requires_grad_()
    ours = pool(log_ratio_N, seq_N=SEQ_N, sequences=2, importance_sampling_level=level)
    torch.testing.assert_close(ours.detach(), double(*POOLED[level]))
    ours[0].backward()
    torch.testing.assert_close(log_ratio_N.grad, double(*OF_THE_FIRST[level]))


def test_a_ratio_is_exact_up_to_the_bound_and_its_tangent_beyond():
    """At 20 + 3 the tangent of exp at 20 is at 4 exp(20); at 300 and 1,000 exp itself is infinite in fp32."""
    log_ratio = torch.tensor([-200.0, -1.0, 0.0, LOG3, 20.0, 23.0, 300.0, 1000.0], requires_grad=True)
    ours = ratio(log_ratio)
    top = math.exp(20)
    expected = torch.tensor([0.0, math.exp(-1), 1.0, 3.0, top, 4 * top, 281 * top, 981 * top])
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, math.exp(-1), 1.0, 3.0, top, top, top, top]))
    assert MAX_LOG_RATIO == 20


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("level", LEVELS)
def test_log_ratios_without_an_exponential_leave_finite_losses_and_gradients(name, level):
    """In fp32 exp(100) is infinite. Of tokens at a positive advantage clipping removes it: they have no gradient; the
    others keep theirs, of the sign that makes them less likely."""
    logp_N = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old_N, advantage_N = torch.tensor([-101.0, -101.0, -101.0, -101.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss_N = surrogate(name, logp_N, old_N, advantage_N, torch.tensor([0, 0, 1, 1]), 2, level)
    assert loss_N.isfinite().all()
    loss_N.sum().backward()
    assert logp_N.grad.isfinite().all()
    if POLICY_LOSSES[name].bounds is ratio_bounds:
        torch.testing.assert_close(loss_N[:2], torch.full((2,), -1.3))
        assert (logp_N.grad[:2] == 0).all() and (logp_N.grad[2:] > 0).all()


def test_what_compares_with_others_stays_finite_too():
    """The divergence from a reference that finds a token e^100 times likelier pulls it up; a sampler's weight is masked
    or bounded."""
    logp_N = torch.tensor([-101.0], requires_grad=True)
    k3(logp_N=logp_N, ref_logp_N=torch.tensor([-1.0])).sum().backward()
    torch.testing.assert_close(logp_N.grad, torch.tensor([1 - math.exp(20)]))
    gaps = {"policy_logp_N": torch.tensor([-1.0]), "sampler_logp_N": torch.tensor([-101.0])}
    where = {"seq_N": torch.tensor([0]), "sequences": 1, "low": None}
    for mode, high, expected in (
        ("token_truncate", 3.0, 3.0),
        ("sequence_mask", 3.0, 0.0),
        ("token_truncate", None, math.exp(20)),
    ):
        torch.testing.assert_close(correction(**gaps, **where, mode=mode, high=high), torch.tensor([expected]))


def test_quantile_is_torchs_and_has_no_limit():
    for values, share in ((drawn(7), 0.2), (drawn(10, seed=3), 0.5), (drawn(1), 0.9), (drawn(4), 1.0), (drawn(4), 0.0)):
        torch.testing.assert_close(quantile(values, share), values.quantile(share))
    many = torch.arange(2**24 + 2, dtype=torch.float64).flip(0)
    assert quantile(many, 0.25) == (2**24 + 1) / 4


# --- surrogates -------------------------------------------------------------------------------------------------------


def test_clip():
    """With bounds 0.8 and 1.3: what is already far the right way counts as the bound, the rest as it is."""
    ratio_N = double(2, 0.5, 1.1, 2, 0.5, 1.1)
    advantage_N = double(1, 1, 1, -1, -1, -1)
    ours = clip(ratio_N=ratio_N, advantage_N=advantage_N, epsilon=0.2, epsilon_high=0.3)
    torch.testing.assert_close(ours, double(-1.3, -0.5, -1.1, 2, 0.8, 1.1))


def test_two_sided_clip():
    """Nothing bounds a ratio of 5 at a negative advantage but `delta`."""
    ratio_N, advantage_N = double(5, 5, 2, 0.5), double(-1, 1, -1, -1)
    ours = clip(ratio_N=ratio_N, advantage_N=advantage_N, epsilon=0.2, epsilon_high=0.3, delta=3.0)
    torch.testing.assert_close(ours, double(3, -1.3, 2, 0.8))


def test_clip_without_bounds_is_the_ratio():
    ratio_N, advantage_N = drawn(9).exp(), drawn(9, seed=1)
    ours = clip(ratio_N=ratio_N, advantage_N=advantage_N, epsilon=math.inf, epsilon_high=math.inf)
    torch.testing.assert_close(ours, -ratio_N * advantage_N)


def test_what_is_clipped_has_no_gradient():
    ratio_N = double(2, 0.5, 2, 0.5, 5).requires_grad_()
    advantage_N = double(1, 1, -1, -1, -1)
    clip(ratio_N=ratio_N, advantage_N=advantage_N, epsilon=0.2, epsilon_high=0.3, delta=3.0).sum().backward()
    assert ratio_N.grad.tolist() == [0, -1, 1, 0, 0]


def test_cispo():
    """Ratios 1/2 and 3, the latter as 1.3; each keeps the gradient of its log-prob."""
    logp_N = double(-1, -2).requires_grad_()
    advantage_N = double(2, 2)
    ours = cispo(ratio_N=double(0.5, 3), advantage_N=advantage_N, logp_N=logp_N, epsilon_high=1.3)
    torch.testing.assert_close(ours.detach(), double(1, 5.2))  # 0.5 · 2 · 1, 1.3 · 2 · 2
    ours.sum().backward()
    torch.testing.assert_close(logp_N.grad, double(-1, -2.6))


def test_sapo():
    """At a ratio of one the soft gate is half of 4/t. At log-odds log 3, s = 3/4: t (r - 1) = log 3."""
    ratio_N = double(1, 1, 1 + LOG3 / 2, 1 + LOG3 / 4)
    ours = sapo(ratio_N=ratio_N, advantage_N=double(1, -1, 1, -1), sapo_temperature_pos=2.0, sapo_temperature_neg=4.0)
    torch.testing.assert_close(ours, double(-1, 0.5, -1.5, 0.75))


def test_sapo_has_the_gradient_of_the_policy_where_the_policy_is_the_old_one():
    ratio_N = torch.ones(4, dtype=torch.float64, requires_grad=True)
    advantage_N = double(1, -2, 0.5, 0)
    sapo(ratio_N=ratio_N, advantage_N=advantage_N, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05).sum().backward()
    torch.testing.assert_close(ratio_N.grad, -advantage_N)


def vespo_of(log_ratio_N, advantage_N, **further):
    given = {"seq_N": SEQ_N, "sequences": 2, **{name: SETTINGS[name] for name in SETTINGS if "vespo" in name}}
    return vespo_weight(log_ratio_N=log_ratio_N, advantage_N=advantage_N, **given, **further)


def test_vespo():
    """Ratios 1/2 · 4 = 2 and 1/2. Better: e³ · 2² · e^-6 = 4 e^-3. Worse: e² · (1/2)³ · e^-1 = e/8."""
    logp_N = double(-1, -2, -3).requires_grad_()
    weight_N = vespo_of(double(-LOG2, 2 * LOG2, -LOG2), double(1, 1, -1))
    expected = double(4 * math.exp(-3), 4 * math.exp(-3), math.e / 8)
    torch.testing.assert_close(weight_N, expected)
    given = {"seq_N": SEQ_N, "sequences": 2, **{name: SETTINGS[name] for name in SETTINGS if "vespo" in name}}
    log_ratio_N = double(-LOG2, 2 * LOG2, -LOG2).requires_grad_()
    ours = vespo(log_ratio_N=log_ratio_N, advantage_N=double(1, 1, -1), logp_N=logp_N, **given)
    torch.testing.assert_close(ours.detach(), expected * double(1, 2, -3))
    ours.sum().backward()
    torch.testing.assert_close(logp_N.grad, expected * double(-1, -1, 1))
    assert log_ratio_N.grad is None


def test_vespo_corrected_for_another_sampler():
    """The weights of a sequence's tokens multiply its ratio; one of zero leaves next to nothing."""
    log_ratio_N, log_weight_N = double(-LOG2, LOG2, 0), double(LOG2, 0, -math.inf)
    ours = vespo_of(log_ratio_N, double(1, 1, 1), log_correction_N=log_weight_N)
    torch.testing.assert_close(ours, double(4 * math.exp(-3), 4 * math.exp(-3), math.exp(3) * 1e-16))


def test_vespo_of_far_away_is_finite():
    weight_N = vespo_of(double(-1e4, 0, 1e4), double(1, 1, -1))
    assert weight_N.isfinite().all() and (weight_N < 1e-6).all()
    torch.testing.assert_close(vespo_of(double(0, 0, 0), double(1, 1, -1)), double(1, 1, 1))


def test_gmpo():
    """Better: log-ratios 0.1 and 0.7, of which 0.3 is left, mean 0.2. Worse: -0.5, of which -0.2 is left."""
    log_ratio_N = double(0.1, 0.7, -0.5)
    given = {"seq_N": SEQ_N, "sequences": 2, "epsilon": 0.2, "epsilon_high": 0.3}
    ours = gmpo(log_ratio_N=log_ratio_N, advantage_N=double(2, 2, -1), **given)
    torch.testing.assert_close(ours, double(-2 * math.exp(0.2), -2 * math.exp(0.2), math.exp(-0.2)))
    # The other way round nothing is clipped: lowering a good completion, raising a bad one.
    ours = gmpo(log_ratio_N=log_ratio_N, advantage_N=double(-1, -1, 3), **given)
    torch.testing.assert_close(ours, double(math.exp(0.4), math.exp(0.4), -3 * math.exp(-0.5)))


def test_gmpo_shares_the_gradient_over_a_sequence():
    """d exp(mean) = exp(mean) / 2 for each of two tokens; the clipped one has none."""
    log_ratio_N = double(0.1, 0.7, 0).requires_grad_()
    loss_N = gmpo(
        log_ratio_N=log_ratio_N, advantage_N=double(2, 2, 0), seq_N=SEQ_N, sequences=2, epsilon=0.2, epsilon_high=0.3
    )
    by_sequence(loss_N, SEQ_N, 2).backward()
    torch.testing.assert_close(log_ratio_N.grad, double(-math.exp(0.2), 0, 0))


# --- what else a token adds -------------------------------------------------------------------------------------------


def test_k3():
    """The reference twice as likely: 2 - log 2 - 1; half as likely: 1/2 + log 2 - 1."""
    ours = k3(logp_N=double(-2, -2, -2), ref_logp_N=double(-2, -2 + LOG2, -2 - LOG2))
    torch.testing.assert_close(ours, double(0, 1 - LOG2, LOG2 - 0.5))


def test_k3_is_the_divergence_in_the_mean():
    pi_V, ref_V = drawn(7).softmax(0), drawn(7, seed=1).softmax(0)
    ours = (pi_V * k3(logp_N=pi_V.log(), ref_logp_N=ref_V.log())).sum()
    torch.testing.assert_close(ours, (pi_V * (pi_V / ref_V).log()).sum())


def test_whom_off_policy_masking_keeps():
    """Mean gaps of 0.3 (0.1 and 0.5) and 0.2 by a threshold of 0.25; whoever is not worse stays; unknown is no gap."""

    def keep(sampler: list[float], advantage: list[float]) -> list[float]:
        given = {"seq_N": SEQ_N, "sequences": 2, "off_policy_mask_threshold": 0.25}
        return off_policy_keep(
            advantage_N=double(*advantage), logp_N=double(-1, -1, -1), sampler_logp_N=double(*sampler), **given
        ).tolist()

    assert keep([-0.9, -0.5, -0.8], [-1, -1, -1]) == [0, 0, 1]
    assert keep([-0.9, -0.5, -0.8], [0, 0, 1]) == [1, 1, 1]
    assert keep([-0.9, math.nan, -0.7], [-1, -1, -1]) == [1, 1, 0]
    assert keep([-9, -9, -9], [-1, -1, -1]) == [1, 1, 1]


# Ratios 1/2, 3 and 2: of sequences 3/2 and 2, of geometric means √1.5 and 2.
ROOT = 1.5**0.5
CORRECTED = {
    "token_truncate": [0.75, 2.5, 2],
    "token_mask": [0, 0, 2],
    "sequence_truncate": [1.5, 1.5, 2],
    "sequence_mask": [1.5, 1.5, 2],
    "geometric_truncate": [ROOT, ROOT, 2],
    "geometric_mask": [ROOT, ROOT, 2],
}
TIGHT = {
    "token_truncate": [1.3, 1.8, 1.8],
    "token_mask": [0, 0, 0],
    "sequence_truncate": [1.5, 1.5, 1.8],
    "sequence_mask": [1.5, 1.5, 0],
    "geometric_truncate": [1.3, 1.3, 1.8],
    "geometric_mask": [0, 0, 0],
}


@pytest.mark.parametrize("mode", CORRECTED)
def test_corrections(mode):
    policy_logp_N = double(-LOG2, LOG3, LOG2).requires_grad_()
    given = {"sampler_logp_N": double(0, 0, 0), "seq_N": SEQ_N, "sequences": 2, "mode": mode}

    def of(low: float | None, high: float | None) -> torch.Tensor:
        return correction(policy_logp_N=policy_logp_N, low=low, high=high, **given)

    torch.testing.assert_close(of(0.75, 2.5), double(*CORRECTED[mode]))
    torch.testing.assert_close(of(1.3, 1.8), double(*TIGHT[mode]))
    free_N = double(
        *{"token": [0.5, 3, 2], "sequence": [1.5, 1.5, 2], "geometric": [ROOT, ROOT, 2]}[mode.split("_")[0]]
    )
    torch.testing.assert_close(of(None, None), free_N)
    # A bound on one side leaves the other free.
    torch.testing.assert_close(of(0.4, None), free_N)
    torch.testing.assert_close(of(None, 3.1), free_N)
    assert not of(None, None).requires_grad


@pytest.mark.parametrize("mode", CORRECTED)
def test_a_sampler_that_says_nothing_is_not_corrected(mode):
    """Nor is a token whose log-prob is unknown: its ratio is 1."""
    ours = correction(
        policy_logp_N=double(-1, -2, -3), sampler_logp_N=double(math.nan, -2, -3),
        seq_N=SEQ_N, sequences=2, mode=mode, low=0.5, high=3.0,
    )  # fmt: skip
    assert ours.tolist() == [1, 1, 1]


def test_high_entropy():
    assert high_entropy(double(0.1, 0.2, 0.3), threshold=double(0.2)[0]).tolist() == [0, 1, 1]


# --- adding up --------------------------------------------------------------------------------------------------------


def test_adding_up():
    """1 and 3 in a sequence, 5 in another, none in a third: 2 + 5, and 9."""
    assert by_sequence(double(1, 3, 5), SEQ_N, 3) == 7
    assert by_token(double(1, 3, 5), SEQ_N, 3) == 9


REDUCTIONS = {
    "grpo": (by_sequence, SEQUENCES), "bnpo": (by_token, TOKENS), "dr_grpo": (by_token, BUDGET),
    "dapo": (by_token, TOKENS), "cispo": (by_token, TOKENS), "sapo": (by_sequence, SEQUENCES),
    "luspo": (by_token, SEQUENCES), "vespo": (by_token, TOKENS), "gmpo": (by_sequence, SEQUENCES),
}  # fmt: skip


def test_every_method_is_known():
    assert {name: (each.add_up, each.divide_by) for name, each in POLICY_LOSSES.items()} == REDUCTIONS
    clipping = {name for name, each in POLICY_LOSSES.items() if each.surrogate is clip}
    assert clipping == {name for name, each in POLICY_LOSSES.items() if each.bounds is ratio_bounds}
    assert {name for name, each in POLICY_LOSSES.items() if each.bounds is None} == {"sapo", "vespo"}
    assert [name for name, each in POLICY_LOSSES.items() if each.corrects_itself] == ["vespo"]


# --- all of them ------------------------------------------------------------------------------------------------------

# Sequences of 3, 1 and 4 tokens, none in the one between.
SEQ_8 = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3])
ADVANTAGE_8 = double(1.5, -0.7, 0, -2)[SEQ_8]


DETACHED = {"cispo", "vespo"}  # their weights have no gradient: it is worked out above


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES.keys() - DETACHED))
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradients_in_float64(name, level):
    old_N = drawn(8, seed=3)
    logp_N = (old_N + drawn(8, 0.4, seed=4)).requires_grad_()

    def loss(logp_N: torch.Tensor) -> torch.Tensor:
        return POLICY_LOSSES[name].add_up(
            surrogate(name, logp_N, old_N, ADVANTAGE_8, SEQ_8, 4, level, delta=1.5), SEQ_8, 4
        )

    assert torch.autograd.gradcheck(loss, (logp_N,))


def test_gradients_of_what_tokens_add_in_float64():
    logp_N, ref_N = drawn(8).requires_grad_(), drawn(8, seed=1)
    assert torch.autograd.gradcheck(lambda x: k3(logp_N=x, ref_logp_N=ref_N), (logp_N,))


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_on_the_policy_all_have_the_gradient_of_reinforce(name, level):
    """`-A d log pi`, added up each in its way; CISPO with its bound on the ratio."""
    old_N = drawn(8)
    logp_N = old_N.clone().requires_grad_()
    add_up = POLICY_LOSSES[name].add_up
    loss_N = surrogate(name, logp_N, old_N, ADVANTAGE_8, SEQ_8, 4, level, epsilon_high=2.0)
    ours = torch.autograd.grad(add_up(loss_N, SEQ_8, 4), logp_N)[0]
    plain_N = old_N.clone().requires_grad_()
    expected = torch.autograd.grad(add_up(-ADVANTAGE_8 * plain_N, SEQ_8, 4), plain_N)[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_sequences_of_one_token_have_one_level(name, level):
    seq_N, advantage_N = torch.arange(8), drawn(8, seed=5)
    old_N, logp_N = drawn(8, seed=3), drawn(8, seed=3) + drawn(8, 0.4, seed=4)
    expected = surrogate(name, logp_N, old_N, advantage_N, seq_N, 8, "token")
    torch.testing.assert_close(surrogate(name, logp_N, old_N, advantage_N, seq_N, 8, level), expected)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_order_has_no_say(name, level):
    """Sequences in another order, and other sequences beside them, change no token."""
    old_N, logp_N = drawn(8, seed=3), drawn(8, seed=3) + drawn(8, 0.4, seed=4)
    expected = surrogate(name, logp_N, old_N, ADVANTAGE_8, SEQ_8, 4, level)
    order = torch.tensor([4, 5, 6, 7, 3, 0, 1, 2])
    moved = surrogate(
        name, logp_N[order], old_N[order], ADVANTAGE_8[order], torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]), 3, level
    )
    torch.testing.assert_close(moved, expected[order])
    alone = surrogate(name, logp_N[:3], old_N[:3], ADVANTAGE_8[:3], SEQ_8[:3], 1, level)
    torch.testing.assert_close(alone, expected[:3])


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_an_advantage_of_zero_costs_nothing(name, level):
    """Nor does it have a gradient, wherever the policy went: what leaves before the forward pass may leave."""
    old_N = drawn(8, 3.0)
    logp_N = drawn(8, 3.0, seed=1).requires_grad_()
    loss_N = surrogate(name, logp_N, old_N, torch.zeros(8, dtype=torch.float64), SEQ_8, 4, level)
    assert (loss_N == 0).all()
    assert (torch.autograd.grad(loss_N.sum(), logp_N)[0] == 0).all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_costs_nothing(name, level):
    nothing, seq_N = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.long)
    for sequences in (0, 2):
        loss_N = surrogate(name, nothing, nothing.detach(), nothing.detach(), seq_N, sequences, level)
        total = POLICY_LOSSES[name].add_up(loss_N, seq_N, sequences)
        assert total == 0 and loss_N.shape == (0,)
        total.backward()
    for mode in CORRECTED:
        given = {"seq_N": seq_N, "sequences": 2, "mode": mode, "low": 0.5, "high": 2.0}
        assert len(correction(policy_logp_N=nothing, sampler_logp_N=nothing, **given)) == 0
