"""Micro-batches by a budget of tokens, and steps that are taken again where memory ran out."""

import pytest
import torch
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import chat_rows, first_gradient, pair_rows, preference, sft, tiny
from tests.trainer.test_invariance import METHODS, OF_A_BATCH
from trl.trainer.budget import as_slots, is_lack_of_memory


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


class Limited:
    """A device of so little memory: a forward pass of training over more than `tokens` fails, at once or `late`, when
    its backward pass has added to the gradients of all layers but the embedding."""

    def __init__(self, trainer, tokens, late=False):
        self.tokens, self.late, self.seen, self.failures = tokens, late, [], 0
        trainer.model.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module, args, output):
        if not torch.is_grad_enabled() or not output.requires_grad:
            return
        self.seen.append(args[0].numel())
        if args[0].numel() <= self.tokens:
            return
        if self.late:
            output.register_hook(self.fail)
        else:
            self.fail()

    def fail(self, *_):
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def made(method, tokenizer, path, batch, accumulation, **settings):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return METHODS[method](path, tokenizer, max_steps=1, **sizes, **settings)


def trained(trainer):
    return first_gradient(trainer), trainer.state.log_history[0]


def check_equal(found, expected, ignored=OF_A_BATCH):
    (gradient, log), (wanted, wanted_log) = found, expected
    assert log.keys() == wanted_log.keys()
    for name in wanted_log.keys() - set(ignored):
        assert log[name] == pytest.approx(wanted_log[name], rel=1e-5, abs=1e-5), name
    for name, each in wanted.items():
        torch.testing.assert_close(gradient[name], each, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_changes_no_gradient_and_bounds_forward_passes(method, tokenizer, tmp_path):
    whole = trained(made(method, tokenizer, tmp_path, 16, 1, max_tokens_per_micro_batch=10**6))
    for batch, accumulation in ((2, 8), (16, 1)):
        trainer = made(method, tokenizer, tmp_path, batch, accumulation, max_tokens_per_micro_batch=150)
        limited = Limited(trainer, 10**6)
        check_equal(trained(trainer), whole)
        assert len(limited.seen) > 1 and max(limited.seen) <= 150
    trainer = made(method, tokenizer, tmp_path, 2, 8, max_tokens_per_micro_batch=10**6)
    limited = Limited(trainer, 10**6)
    check_equal(trained(trainer), whole)
    assert len(limited.seen) == 1  # all rows of the step in one


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_runs_out_of_memory_is_taken_again(method, late, tokenizer, tmp_path):
    settings = {"max_tokens_per_micro_batch": 10**6} if method in ("ppo", "online-dpo", "xpo", "nash-md") else {}
    whole = made(method, tokenizer, tmp_path, 16, 1, **settings)
    free = Limited(whole, 10**6)
    expected = trained(whole)
    for batch, accumulation in ((16, 1), (8, 2)):
        trainer = made(method, tokenizer, tmp_path, batch, accumulation, **settings)
        limited = Limited(trainer, max(free.seen) // 3, late)
        check_equal(trained(trainer), expected)
        assert limited.failures > 0
        assert 0 < trainer.budget.tokens <= max(free.seen)
        assert trainer.state.global_step == 1


def test_further_steps_are_cut_beforehand_and_a_checkpoint_keeps_the_budget(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl.notices._printed", set())
    settings = {"per_device_train_batch_size": 16, "max_steps": 3, "save_steps": 2, "save_strategy": "steps"}
    trainer = sft(tmp_path / "a", tiny(tokenizer), tokenizer, chat_rows(16), **settings)
    limited = Limited(trainer, 300)
    trainer.train()
    failures, budget = limited.failures, trainer.budget.tokens
    assert failures > 0 and max(limited.seen[-3:]) <= 300
    notices = [line for line in capsys.readouterr().out.splitlines() if "memory ran out" in line]
    assert len(notices) == 1 and f"at most {budget:,} tokens from here on" in notices[0]
    free = sft(tmp_path / "b", tiny(tokenizer), tokenizer, chat_rows(16), **settings)
    free.train()
    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (trainer, free)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, each in free.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], each, atol=1e-4, rtol=1e-4, msg=name)

    again = sft(tmp_path / "a", tiny(tokenizer), tokenizer, chat_rows(16), **settings)
    limited = Limited(again, 300)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert limited.failures == 0 and again.budget.tokens == budget
    for name, each in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], each), name

    settings["max_tokens_per_micro_batch"] = 250  # asked for anew: on another machine, for example
    other = sft(tmp_path / "a", tiny(tokenizer), tokenizer, chat_rows(16), **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert other.budget.tokens == 250


def test_the_budget_is_lowered_where_memory_is_found_only_at_the_second_try(tokenizer, tmp_path, capsys, monkeypatch):
    """As the allocator of a GPU counts it: once in each step that computes more than 600 tokens at a time."""
    monkeypatch.setattr("trl.notices._printed", set())
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(32), per_device_train_batch_size=16, max_steps=12)
    limited = Limited(trainer, 10**6)
    monkeypatch.setattr("trl.trainer.budget.retries_on", lambda device: sum(each > 600 for each in limited.seen))
    trainer.train()
    largest = max(limited.seen)
    assert largest > 600 >= max(limited.seen[-4:]) and trainer.budget.tokens <= 0.75 * largest
    assert min(limited.seen[:3]) > 600  # the steps before it was lowered, uncut
    assert "memory was found only at the second try in 3 steps on end" in capsys.readouterr().out
    free = sft(tmp_path / "b", tiny(tokenizer), tokenizer, chat_rows(32), per_device_train_batch_size=16, max_steps=12)
    free.train()
    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (trainer, free)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_row_that_is_too_long_by_itself_is_named(tokenizer, tmp_path):
    rows = chat_rows(8)
    rows[5]["messages"][-1]["content"] *= 40
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, rows, per_device_train_batch_size=8, max_steps=1)
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    Limited(trainer, longest - 1)
    with pytest.raises(torch.OutOfMemoryError, match=rf"row 5 has {longest:,} tokens.*nothing was beside it") as found:
        trainer.train()
    assert "max_length" in str(found.value) and "Tried to allocate 2.00 GiB" in str(found.value)
    assert all(torch.equal(each, before[name]) for name, each in trainer.model.state_dict().items())


def test_an_adapter_and_mixed_precision(tokenizer, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    for settings in ({"peft_config": lora}, {"bf16": True}, {"peft_config": lora, "bf16": True}):
        torch.manual_seed(0)  # of the adapter
        whole = preference("DPO", tmp_path, tiny(tokenizer), tokenizer, pair_rows(16), max_steps=1,
                           per_device_train_batch_size=16, **settings)  # fmt: skip
        expected, log = trained(whole)
        torch.manual_seed(0)
        trainer = preference("DPO", tmp_path, tiny(tokenizer), tokenizer, pair_rows(16), max_steps=1,
                             per_device_train_batch_size=16, **settings)  # fmt: skip
        limited = Limited(trainer, 400, late=True)
        gradient, found = trained(trainer)
        assert limited.failures > 0
        tolerance = 1e-5 if "bf16" not in settings else 2e-2
        assert found["loss"] == pytest.approx(log["loss"], rel=tolerance)
        for name, each in expected.items():
            torch.testing.assert_close(gradient[name], each, atol=tolerance * float(each.abs().max()), rtol=tolerance)


@pytest.mark.parametrize("method", ["sft", "dpo-aot", "kto", "reward"])
def test_an_evaluation_is_cut_and_survives_too(method, tokenizer, tmp_path):
    def evaluated(limit=10**6, **settings):
        trainer = made(method, tokenizer, tmp_path, 4, 1, per_device_eval_batch_size=16, **settings)
        seen = []

        def hook(module, args, output):
            seen.append(args[0].numel())
            if seen[-1] > limit:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")

        trainer.model.get_input_embeddings().register_forward_hook(hook)
        found = trainer.evaluate(trainer.train_dataset)
        times = ("runtime", "per_second", "preparation_time")
        return {name: value for name, value in found.items() if not name.endswith(times)}, seen, trainer

    whole, seen, _ = evaluated()
    cut, parts, _ = evaluated(max_tokens_per_micro_batch=150)
    assert cut == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert max(parts) <= 150 < max(seen)
    survived, _, trainer = evaluated(limit=max(seen) // 3)
    assert survived == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert trainer.budget.tokens <= max(seen) // 2


def test_other_errors_pass(tokenizer, tmp_path):
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), max_steps=1)

    def hook(*_):
        raise RuntimeError("something else")

    trainer.model.get_input_embeddings().register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


def test_what_is_a_lack_of_memory():
    assert is_lack_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_lack_of_memory(MemoryError())
    assert is_lack_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_lack_of_memory(RuntimeError("MPS backend out of memory"))
    assert not is_lack_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_slots():
    assert as_slots([1, 2, 3], 3) == [1, 2, 3]
    assert as_slots([1], 3) == [[], [], [1]]
    assert as_slots([1, 2], 4) == [[1], [], [], [2]]
    assert as_slots([1, 2, 3, 4, 5], 2) == [[1], [2, 3, 4, 5]]
    assert as_slots([1, 2], 1) == [[1, 2]]


@pytest.mark.parametrize(
    "asked, found", [("auto", "auto"), ("2048", 2048), ("2,048", 2048), (2048, 2048), (None, None)]
)
def test_the_option(asked, found, tmp_path):
    assert trl.SFTConfig(output_dir=str(tmp_path), max_tokens_per_micro_batch=asked).max_tokens_per_micro_batch == found


@pytest.mark.parametrize("asked", ["often", "0", -3, 1.5])
def test_impossible_budgets(asked, tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch"):
        trl.SFTConfig(output_dir=str(tmp_path), max_tokens_per_micro_batch=asked)


def test_the_budget_is_in_the_report_and_means_of_a_loss_of_ones_own_are_told(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl.notices._printed", set())

    class Means(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    class Sums(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    for kind, budget in ((Sums, 150), (Means, None), (Means, 150)):
        args = trl.SFTConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=8, max_tokens_per_micro_batch=budget,
            report_to="none", save_strategy="no", use_cpu=True,
        )  # fmt: skip
        run = kind(tiny(tokenizer), args, train_dataset=chat_rows(8), processing_class=tokenizer)
        run.train()
        said = capsys.readouterr().out
        told = ["micro-batches: at most 150 tokens each (max_tokens_per_micro_batch)"] if budget else []
        assert run.budget.report(run) == told
        assert ("compute_loss returns means of micro-batches" in said) == (kind is Means and budget is not None)
