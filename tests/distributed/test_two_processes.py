"""Two gloo processes, or four where some have no rows: gradients equal one process, whatever the split; a rank that
throws ends both."""

import json
import time

import pytest
import torch
from transformers import AutoTokenizer

from tests.distributed import worker
from tests.distributed.launcher import launch, run
from tests.engine import families
from tests.rollout.helpers import sample
from tests.trainer import test_online, test_overrides
from tests.trainer.helpers import first_gradient
from trl.engine.probe import attach
from trl.engine.score import score
from trl.losses.tokens import seq_sum
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def assert_same(ours, theirs, what):
    assert ours.keys() == theirs.keys() and ours, what
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{what} {n}: {m}")


def assert_near(ours, theirs, tolerance):
    """Equal within so much of each gradient's size."""
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-6, name


def test_ddp_equals_one_process(tmp_path, small_path):
    """Eight rows split evenly; seven, so that a batch is short; five, so that one rank's last batch is empty."""
    launch(worker, "ddp", tmp_path, small_path)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for rows in (8, 7, 5):
        for adapter in (False, True):
            alone = worker.trainer(
                tmp_path / "alone", tokenizer, rows, adapter, False, per_device_train_batch_size=rows
            )
            expected = first_gradient(alone)
            for checkpointing in (False, True):
                name = f"ddp-{rows}-{adapter}-{checkpointing}"
                assert_same(torch.load(tmp_path / f"{name}.pt"), expected, name)
                line = json.loads((tmp_path / f"{name}.json").read_text())
                for metric in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
                    assert line[metric] == pytest.approx(alone.state.log_history[0][metric], rel=1e-5), (name, metric)


def test_losses_of_ones_own_equal_one_process(tmp_path, small_path):
    """Made of ours, of `num_items_in_batch`, or a mean over the rows of the micro-batch."""
    launch(worker, "own_losses", tmp_path, small_path)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for cls in test_overrides.DISTRIBUTED:
        settings = {"max_steps": 1, "per_device_train_batch_size": 5}
        rows = worker.chat_rows(5)
        alone = test_overrides.made(cls, tmp_path / "alone", tokenizer, rows, rows, settings)
        found = json.loads((tmp_path / f"{cls.__name__}.json").read_text())
        assert found["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5), cls
        assert_same(torch.load(tmp_path / f"{cls.__name__}.pt"), first_gradient(alone), cls.__name__)
        assert found["loss"] == pytest.approx(test_overrides.logged(alone)["loss"], rel=1e-5), cls


def test_preferences_equal_one_process(tmp_path, small_path, monkeypatch):
    """Statistics over the optimizer step are those of both ranks; so are the reference's log-probs."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of the two
    monkeypatch.setattr("trl.trainer.reference.reference_cache", lambda: tmp_path / "cache_of_one")
    launch(worker, "preferences", tmp_path, small_path)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for name in worker.PREFERENCES:
        for adapter in (False,) if name == "reward" else (False, True):
            alone = worker.preferring(name, tmp_path / "alone", tokenizer, 5, adapter, per_device_train_batch_size=5)
            expected = first_gradient(alone)
            assert_same(torch.load(tmp_path / f"{name}-{adapter}.pt"), expected, f"{name} {adapter}")
            line = json.loads((tmp_path / f"{name}-{adapter}.json").read_text())
            for metric in line.keys() - {"grad_norm", "total_flos"}:
                found = alone.state.log_history[0][metric]
                assert line[metric] == pytest.approx(found, rel=1e-5, abs=1e-5), (name, metric)
    alone = worker.preferring("dpo", tmp_path / "alone", tokenizer, 5, True, precompute_ref_log_probs=True)
    expected = torch.tensor(list(alone.train_dataset["ref_chosen_logps"]))
    torch.testing.assert_close(torch.load(tmp_path / "reference.pt"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_reference_equals_one_process(tmp_path, small_path, precision):
    launch(worker, "sharded_preferences", tmp_path, small_path, precision, timeout=240)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for adapter in (False, True):
        half = precision == "bf16"
        alone = worker.preferring(
            "dpo", tmp_path / "alone", tokenizer, 5, adapter, per_device_train_batch_size=5, bf16=half
        )
        ours, theirs = torch.load(tmp_path / f"dpo-sharded-{adapter}.pt"), first_gradient(alone)
        if half:
            # One process has fp32 weights that autocast rounds; the sharded ones are bf16 all the way.
            assert_near(ours, theirs, 0.2)
        else:
            assert_same(ours, theirs, f"dpo {adapter}")
        line = json.loads((tmp_path / f"dpo-sharded-{adapter}.json").read_text())
        for metric in ("loss", "rewards/margins", "logps/chosen", "entropy"):
            expected = pytest.approx(alone.state.log_history[0][metric], **({"rel": 1e-3, "abs": 1e-3} if half else
                                     {"rel": 1e-5, "abs": 1e-5}))  # fmt: skip
            assert line[metric] == expected, metric
        for rank in range(2):
            assert "resume with as many processes" in (tmp_path / f"refused-{adapter}-{rank}.txt").read_text()


def test_online_methods_equal_one_process(tmp_path, small_path):
    """The two ranks draw different completions of the same prompts, and have different numbers of micro-batches."""
    launch(worker, "online", tmp_path, small_path)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for name in worker.ONLINE:
        expected, line = test_online.first_step(worker.drawing(name, tmp_path / "alone", tokenizer, 8))
        assert_same(torch.load(tmp_path / f"{name}.pt"), expected, name)
        found = json.loads((tmp_path / f"{name}.json").read_text())
        alike = ("loss", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length")
        further = ("entropy", "loss/value_avg", "objective/kl", "objective/entropy", "val/error")
        for metric in (*alike, *(each for each in further if each in line)):
            assert found[metric] == pytest.approx(line[metric], rel=1e-4, abs=1e-6), (name, metric)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp2_equals_one_process(tmp_path, small_path, precision):
    """In bf16 too, log-probs are those of one process with weights in bf16, also when 300 are added up; and gradients
    are the mean of those of the ranks, which is taken in fp32."""
    launch(worker, "fsdp", tmp_path, small_path, precision, timeout=240)
    for case in worker.FSDP_CASES:
        adapter, _, _, tied = case
        name = "-".join(map(str, case))
        model = worker.fsdp_model(adapter, tied)
        if precision == "bf16":
            for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32
                parameter.data = parameter.data.bfloat16()
        attachment = attach(model)
        batches = [attachment.batch(worker.fsdp_trees(rank)) for rank in range(2)]
        items = sum(batch["target_N"].shape[0] for batch in batches)
        expected = {}
        for rank, batch in enumerate(batches):
            stats = score(model, batch)
            theirs, ours = stats.logp_N.detach(), torch.load(tmp_path / f"logp-{name}-{rank}.pt")
            assert ours.dtype == theirs.dtype == torch.float32
            sums = [seq_sum(logp_N, stats.seq_N, stats.sequences) for logp_N in (ours, theirs)]
            torch.testing.assert_close(*sums, atol=1e-3, rtol=1e-5)
            model.zero_grad()
            (-stats.logp_N.sum() * 2 / items).backward()
            for parameter, gradient in families.gradients(model).items():
                expected[parameter] = expected.get(parameter, 0.0) + gradient.float() / 2
        # Where gradients are checkpointed the frozen embedding is made to ask for one of its output, not its weight.
        assert_same(torch.load(tmp_path / f"fsdp-{name}.pt"), expected, name)


def test_more_ranks_than_rows(tmp_path, small_path):
    """Ranks without rows have other metrics than the rest, or none: whatever is logged is that of one process."""
    launch(worker, "few_rows", tmp_path, small_path, *worker.JUDGED, ranks=4, timeout=240)
    check_names(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for name in worker.JUDGED:
        for rows in (1, 3):
            alone = worker.few(name, tmp_path / "alone", tokenizer, rows, 1)
            alone.train()
            found = json.loads((tmp_path / f"{name}-{rows}.json").read_text())
            assert len(found) == 4  # a line of training and one of evaluation for each of two steps
            for line, expected in zip(found, worker.lines(alone), strict=True):
                assert line.keys() == expected.keys(), (name, rows)
                for metric, value in expected.items():
                    if metric != "total_flos":
                        assert line[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, rows, metric)


def check_names(path):
    every = [json.loads((path / f"names-{rank}.json").read_text()) for rank in range(4)]
    assert all(found == every[0][0] for found, _ in every)
    *found, refusal = every[0][0]
    for line, (metrics, sums) in enumerate(found):
        assert sums == {"tokens": 6.0}
        # Rank r has r + 1 times the number r, twice; the last rank once.
        assert metrics.pop("all") == pytest.approx((2 * (0 + 1 * 2 + 2 * 3) + 3 * 4) / (2 * (1 + 2 + 3) + 4))
        assert metrics.pop("odd") == pytest.approx((2 * 10 + 30) / (2 * 2 + 2))
        ends = {"low": 4.0, "high": -7.0} if line != 1 else {}
        assert metrics == ends | {0: {"early": 1.0}, 1: {}, 2: {"late": 1.0}}[line]
    # One collective a line, and another where a name is new.
    assert all(gathered[:2] == [2, 1] and gathered[2] == 2 for _, gathered in every)
    assert "the metric mixed is given as mean and as min" in refusal


def test_metrics_of_the_users_own_get_the_rows_of_all_ranks(tmp_path, small_path):
    """Whatever each rank has; and a whole reference that follows is kept in the checkpoint once."""
    launch(worker, "predictions", tmp_path, small_path, timeout=240)
    both = [json.loads((tmp_path / f"predictions-{rank}.json").read_text()) for rank in range(2)]
    expected = worker.predicting(tmp_path / "alone", AutoTokenizer.from_pretrained(small_path), 5).evaluate()
    for *evaluations, resumes_alike, _ in both:
        for found in evaluations:
            assert found["eval_rows"] == found["eval_inputs"] == 10
            for metric in ("right", "logit", "tokens", "loss"):
                assert found[f"eval_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-5), metric
        assert resumes_alike
    assert [kept for *_, kept in both] == [["reference"], []]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_own_completions_equal_one_process(tmp_path, small_path, name):
    """The ranks draw completions of different lengths, so that one is done before the other."""
    launch(worker, "samples", tmp_path, small_path, name, timeout=240)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    alone = worker.sampling(name, tmp_path / "alone", tokenizer, 8)
    expected, line = test_online.first_step(alone)
    found = json.loads((tmp_path / f"samples-{name}.json").read_text())
    ours = [each for rank in found["drawn"] for each in rank]
    theirs = [each for group in alone.sampler.drawn for each in group]
    assert [ids for ids, _, _ in ours] == [each.ids for each in theirs]
    steps = [sum(len(ids) for ids, _, _ in rank) for rank in found["drawn"]]
    assert steps[0] != steps[1]
    for (_, logps, finished), each in zip(ours, theirs, strict=True):
        assert logps == pytest.approx(each.logps, abs=1e-5) and finished is each.finished
    assert_same(torch.load(tmp_path / f"samples-{name}.pt"), expected, name)
    for metric in ("loss", "reward", "entropy", "completions/mean_length"):
        assert found["line"][metric] == pytest.approx(line[metric], rel=1e-4, abs=1e-6), metric


def same_completions(ours, theirs):
    for own, expected in zip(ours, theirs, strict=True):
        assert [(ids, finished) for ids, _, finished in own] == [(e.ids, e.finished) for e in expected]
        for (_, logps, _), each in zip(own, expected, strict=True):
            assert logps == pytest.approx(each.logps, abs=1e-5)


def test_sharded_ranks_with_unequal_shares_draw_what_one_process_draws(tmp_path, small_path):
    launch(worker, "shares", tmp_path, small_path, timeout=120)
    model = families.build("llama").eval()
    attach(model)
    for case, both in enumerate(worker.shared_requests()):
        for rank, requests in enumerate(both):
            layers, round_ = (
                json.loads((tmp_path / f"shares-{way}-{case}-{rank}.json").read_text()) for way in ("layers", "round")
            )
            theirs = sample(InProcessSampler(max_rows=4), model, requests, worker.SHARED)
            for found in (layers, round_):
                same_completions(found["drawn"], theirs)
            assert layers["drawn"] == round_["drawn"] and round_["sharded"]
            # Two layers and the rest, once; else two for each call of the model, this rank's or another's.
            assert round_["gathers"] == (3 if case else 2) and (layers["gathers"] > 10) == any(both)
    for rank in range(2):
        thrown = json.loads((tmp_path / f"thrown-{rank}.json").read_text())
        assert thrown["message"] == "'within a forward pass'"
        assert thrown["sharded"] and thrown["same"] and thrown["settings"]
        same_completions(thrown["drawn"], sample(InProcessSampler(max_rows=4), model,
                                                 [Request([3, 4, 5], 2, (1,))], worker.SHARED))  # fmt: skip
    for rank in range(2):
        own, continuous = json.loads((tmp_path / f"refused-{rank}.json").read_text())
        assert "FalconMambaForCausalLM is served by its own generate" in own and "sharded" in own
        assert "its weights are sharded" in continuous


@pytest.mark.parametrize("stage", ["1", "2"])
def test_deepspeed_takes_the_steps_of_one_process(tmp_path, small_path, monkeypatch, stage):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(worker, "deepspeed", tmp_path, small_path, stage, "fp32", timeout=240)
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    for name in ("grpo", "dpo"):
        alone = worker.deepspeed_runs(name, tmp_path / "alone", tokenizer, 4)
        alone.train()
        lines = json.loads((tmp_path / f"{name}.json").read_text())
        for line, expected in zip(lines, alone.state.log_history, strict=False):
            for metric in ("loss", "grad_norm", "entropy", "num_tokens"):
                # DeepSpeed's norm has a small number added.
                assert line[metric] == pytest.approx(expected[metric], rel=2e-4, abs=1e-5), (name, metric)


def test_deepspeed_in_bf16_keeps_log_probs_in_fp32(tmp_path, small_path, monkeypatch):
    """What the rewards were taken against is what the rows say, to the last digit that is logged."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(worker, "deepspeed", tmp_path, small_path, "2", "bf16", timeout=240)
    (line,) = json.loads((tmp_path / "half.json").read_text())
    for side, expected in (("chosen", worker.CHOSEN), ("rejected", worker.REJECTED)):
        assert line[f"logps/{side}"] - line[f"rewards/{side}"] / 0.1 == pytest.approx(expected, abs=1e-3)


def test_a_rank_that_throws_ends_both_with_its_message(tmp_path, small_path):
    start = time.monotonic()
    done = run(worker, "throws", tmp_path, small_path, timeout=120)
    assert done.returncode != 0
    assert "the second rank cannot go on" in done.stderr
    assert time.monotonic() - start < 100


def test_resume_with_two_processes(tmp_path, small_path):
    launch(worker, "resumes", tmp_path, small_path)
    whole, resumed = json.loads((tmp_path / "resume.json").read_text())
    assert [line["step"] for line in whole] == [3, 6]
    assert resumed == whole
