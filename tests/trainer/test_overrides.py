"""What users override or hand in: it takes effect, at the right scale, or is refused with what to do instead."""

import copy
from types import MethodType

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)

import trl
from tests.trainer.helpers import (
    DEFAULTS,
    chat_rows,
    first_gradient,
    labelled_rows,
    pair_rows,
    preference,
    step_rows,
    tiny,
    tiny_scorer,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.compat.table import HOOKS
from trl.data.batching.batches import RowBatches
from trl.data.batching.collate import labelled


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def made(cls, path, tokenizer, rows=None, eval_rows=None, settings=None, **kwargs):
    """An SFT trainer of a class of one's own on a fresh tiny model."""
    config = SFTConfig(**{**DEFAULTS, "output_dir": str(path), "assistant_only_loss": True, **(settings or {})})
    rows = chat_rows(6) if rows is None else rows
    return cls(
        tiny(tokenizer), config, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer, **kwargs
    )


class TimesTen(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        return 10 * super().compute_loss(*args, **kwargs)


class WithOutputs(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert outputs.logits.shape[:2] == inputs["labels"].shape
        return (loss, outputs) if return_outputs else loss


class ByTheModel(SFTTrainer):
    """As transformers documents it, with a mean over the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class ByItems(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class Constant(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 0 * model(input_ids=inputs["input_ids"]).logits.sum() + 42.0


class MeanOfRows(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].transpose(1, 2)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")
        return (loss.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


DISTRIBUTED = (TimesTen, ByItems, MeanOfRows)


def logged(trainer):
    """The last line of the log of training."""
    return [line for line in trainer.state.log_history if "loss" in line][-1]


def trained_loss(trainer):
    trainer.train()
    return logged(trainer)["loss"]


def test_an_overridden_loss_has_the_scale_of_the_step_and_of_evaluation(tmp_path, tokenizer):
    """Whether it is made of ours, of `num_items_in_batch`, or is a mean over the micro-batch."""
    rows = chat_rows(6)
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
    }  # fmt: skip
    plain = made(SFTTrainer, tmp_path, tokenizer, eval_rows=rows, settings=settings)
    evaluated, gradient = plain.evaluate()["eval_loss"], first_gradient(plain)
    for cls, factor in ((TimesTen, 10), (WithOutputs, 1), (ByItems, 1)):
        own = made(cls, tmp_path, tokenizer, eval_rows=rows, settings=settings)
        assert own.evaluate()["eval_loss"] == pytest.approx(factor * evaluated, rel=1e-5), cls
        theirs = first_gradient(own)
        assert logged(own)["loss"] == pytest.approx(factor * logged(plain)["loss"], rel=1e-5), cls
        for name, value in gradient.items():
            torch.testing.assert_close(theirs[name], factor * value, atol=1e-4, rtol=1e-4)
    constant = made(Constant, tmp_path, tokenizer, eval_rows=rows, settings=settings)
    assert constant.evaluate()["eval_loss"] == pytest.approx(42)
    assert trained_loss(constant) == pytest.approx(42)


def test_a_mean_over_the_micro_batch_weighs_by_its_rows(tmp_path, tokenizer):
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = made(ByTheModel, tmp_path, tokenizer, eval_rows=chat_rows(6), settings=settings)
    loader = trainer.get_train_dataloader()
    with torch.no_grad():
        losses = [
            (trainer.model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], labels=b["labels"]).loss,
             len(b["row_S"])) for b in loader
        ]  # fmt: skip
    expected = sum(float(loss) * rows for loss, rows in losses) / 6
    assert [rows for _, rows in losses] == [4, 2]
    assert trained_loss(trainer) == pytest.approx(expected, rel=1e-5)
    assert "entropy" not in trainer.evaluate()  # super was not asked


def test_a_loss_put_into_the_instance_is_found(tmp_path, tokenizer):
    trainer = made(SFTTrainer, tmp_path, tokenizer, eval_rows=chat_rows(4), settings={"max_steps": 1})
    plain = trainer.evaluate()["eval_loss"]
    ours = trainer.compute_loss
    trainer.compute_loss = MethodType(lambda self, *args, **kwargs: 3 * ours(*args, **kwargs), trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(3 * plain, rel=1e-5)
    assert any("compute_loss of your own" in line for line in trainer.report())


@pytest.mark.parametrize("mean", [True, False])
def test_compute_loss_func_is_the_loss_of_evaluation_too(tmp_path, tokenizer, mean):
    def own(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if mean:
            return 0 * logits.sum() + 42.0
        return 2 * torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    settings["per_device_eval_batch_size"] = 4
    plain = made(SFTTrainer, tmp_path, tokenizer, eval_rows=chat_rows(6), settings=settings)
    trainer = made(SFTTrainer, tmp_path, tokenizer, eval_rows=chat_rows(6), settings=settings, compute_loss_func=own)
    expected = 42 if mean else 2 * plain.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    expected = 42 if mean else 2 * trained_loss(plain)
    assert trained_loss(trainer) == pytest.approx(expected, rel=1e-5)


def test_labels_changed_before_our_loss_take_effect(tmp_path, tokenizer):
    class LastTokens(SFTTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs["labels"][:, :-3] = -100
            return super().compute_loss(model, inputs, **kwargs)

    trainer = made(LastTokens, tmp_path, tokenizer, rows=chat_rows(1), settings={"max_steps": 1})
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logp = trainer.model(input_ids=batch["input_ids"]).logits.log_softmax(-1)[0, -4:-1]
    kept = batch["labels"][0, -3:]
    expected = -sum(float(logp[i, token]) for i, token in enumerate(kept.tolist()) if token != -100)
    assert trained_loss(trainer) == pytest.approx(expected / len(batch["target_N"]), rel=1e-5)


@pytest.mark.parametrize("method", ["DPO", "KTO", "Reward", "PRM"])
def test_other_methods_evaluate_through_an_overridden_loss(tmp_path, tokenizer, method, monkeypatch):
    rows = {"KTO": labelled_rows, "PRM": step_rows}.get(method, pair_rows)(3)
    scores = method in ("Reward", "PRM")

    def trainer():
        own = copy.deepcopy(tokenizer)  # RewardTrainer gives it another padding token
        model = tiny_scorer(own, per_token=method == "PRM") if scores else tiny(own)
        return preference(
            method, tmp_path, model, own, rows, eval_rows=rows, max_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, per_device_eval_batch_size=2,
        )  # fmt: skip

    plain = trainer()
    evaluated, loss = plain.evaluate()["eval_loss"], trained_loss(plain)
    cls = type(plain)
    ours = cls.compute_loss

    def own(self, model, inputs, return_outputs=False, **kwargs):
        found, outputs = ours(self, model, inputs, return_outputs=True, **kwargs)
        assert outputs.logits is not None and model(**inputs).logits is not None
        return 10 * found

    monkeypatch.setattr(cls, "compute_loss", own, raising=False)
    changed = trainer()
    assert changed.evaluate()["eval_loss"] == pytest.approx(10 * evaluated, rel=1e-4)
    assert trained_loss(changed) == pytest.approx(10 * loss, rel=1e-4)


def test_grpo_goes_through_an_overridden_loss(tmp_path, tokenizer):
    class Own(GRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return 0 * super().compute_loss(model, inputs, **kwargs) + 7.0

    config = GRPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, num_generations=2, max_completion_length=4,
                        max_steps=1, per_device_train_batch_size=4, max_tokens_per_micro_batch=1)  # fmt: skip
    rows = [{"prompt": "the cat"}, {"prompt": "a red bird flies"}]
    trainer = Own(tiny(tokenizer), lambda completions, **_: list(range(len(completions))), config, train_dataset=rows,
                  eval_dataset=rows, processing_class=tokenizer)  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(7 * 4)  # a share for each of four micro-batches
    assert trainer.predict(rows).metrics["test_reward"] > 0


# --- the data ---------------------------------------------------------------------------------------------------------


def order_of(trainer):
    return [row for batch in trainer.get_train_dataloader() for row in batch["row_S"].tolist()]


def test_a_sampler_of_ones_own_gives_the_order(tmp_path, tokenizer):
    class Backwards(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return list(reversed(range(len(self.train_dataset))))

    class Batches(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return BatchSampler(SequentialSampler(self.train_dataset), 2, False)

    settings = {"per_device_train_batch_size": 4}
    assert order_of(made(Backwards, tmp_path, tokenizer, settings=settings)) == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="the sampler yields lists and not row numbers"):
        order_of(made(Batches, tmp_path, tokenizer, settings=settings))


def test_rows_of_similar_length_come_together(tmp_path, tokenizer):
    settings = {"per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length"}
    trainer = made(SFTTrainer, tmp_path, tokenizer, settings=settings)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    order = order_of(trainer)
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True) and sorted(order) == list(range(6))
    batches = RowBatches(200, 1, lengths=torch.arange(200).numpy(), step_rows=2)
    assert sorted(batches.order().tolist()) == list(range(200)) and batches.order()[0] != 199
    with pytest.raises(ValueError, match="'batch_rebalance' is not supported"):
        made(SFTTrainer, tmp_path, tokenizer, settings={"train_sampling_strategy": "batch_rebalance"})


def test_a_loader_of_ones_own_is_trained_on(tmp_path, tokenizer):
    """Of token ids and labels, or made of our own rows; another method's batches are asked for by name."""
    rows = [{"input_ids": list(range(5, 15)), "labels": [-100] * 4 + list(range(9, 15))}] * 4

    class Grids(SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(rows, batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))

        get_eval_dataloader = lambda self, dataset=None: self.get_train_dataloader()  # noqa: E731

    class Ours(SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)

    trainer = made(Grids, tmp_path, tokenizer, settings={"max_steps": 1})
    evaluated = trainer.evaluate()["eval_loss"]
    assert trained_loss(trainer) == pytest.approx(evaluated, rel=1e-5)
    assert logged(trainer)["num_tokens"] == 20
    assert order_of(made(Ours, tmp_path, tokenizer)) == list(range(6))

    class Pairs(DPOTrainer):
        get_train_dataloader = Grids.get_train_dataloader

    config = DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=1)
    trainer = Pairs(tiny(tokenizer), None, config, train_dataset=pair_rows(4), processing_class=tokenizer)
    with pytest.raises(ValueError, match="Pairs cannot train on: pass collate_fn=self.data_collator"):
        trainer.train()


def test_standard_collators_take_effect(tmp_path, tokenizer):
    plain = made(SFTTrainer, tmp_path, tokenizer)
    expected = plain.data_collator([plain.train_dataset[row] for row in range(4)])
    padding = DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(tokenizer)
    for collator in (*padding, DataCollatorWithFlattening()):
        trainer = made(SFTTrainer, tmp_path, tokenizer, data_collator=collator)
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
        for name in ("target_N", "seq_N", "row_S"):
            assert torch.equal(batch[name], expected[name]), (collator, name)
        assert any("says which tokens are trained" in line for line in trainer.report())
    trainer = made(SFTTrainer, tmp_path, tokenizer, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    row = trainer.train_dataset[0]
    target = trainer.data_collator([row])["target_N"].tolist()
    assert target == [token for token in row["input_ids"][1:] if token != tokenizer.pad_token_id]

    def mine(rows):
        assert [set(row) for row in rows] == [{"input_ids", "attention_mask", "labels"}] * len(rows)
        assert rows[0]["loss_mask"] == [label != -100 for label in rows[0]["labels"]]
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    trainer = made(SFTTrainer, tmp_path, tokenizer, data_collator=mine)
    assert trainer.data_collator([row])["target_N"].tolist() == expected["target_N"][expected["seq_N"] == 0].tolist()


def test_what_a_collator_cannot_mean_is_refused():
    grids = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 9, 3]])}
    with pytest.raises(ValueError, match="row 7: the data collator returned labels that differ from input_ids"):
        labelled(grids, [7])
    with pytest.raises(ValueError, match="returned 1 rows of 2"):
        labelled({**grids, "labels": grids["input_ids"]}, [0, 1])


def test_data_and_collator_changed_after_construction(tmp_path, tokenizer):
    """As helpers do that mark the answers: `labels` put into the prepared rows, and a collator that pads them."""
    trainer = made(SFTTrainer, tmp_path, tokenizer, settings={"assistant_only_loss": False, "max_steps": 1})
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {"labels": [-100] * (len(row["input_ids"]) - 2) + row["input_ids"][-2:]}
    )
    rows = [trainer.train_dataset[row] for row in range(3)]
    expected = [token for row in rows for token in row["input_ids"][-2:]]
    assert trainer.data_collator(rows)["target_N"].tolist() == expected
    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
    assert trainer.data_collator(rows)["target_N"].tolist() == expected
    trainer.train()
    trainer.train_dataset = chat_rows(3)  # raw rows are prepared
    trainer.eval_dataset = chat_rows(2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    bad = {**rows[0], "labels": [1] * len(rows[0]["input_ids"])}
    with pytest.raises(ValueError, match="`labels` must repeat `input_ids`"):
        trainer.data_collator([bad])


def test_collators_of_other_methods(tmp_path, tokenizer, capsys):
    from trl.data.batching.collators import DataCollatorForPreference

    config = DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)})
    trainer = DPOTrainer(tiny(tokenizer), None, config, DataCollatorForPreference(0), train_dataset=pair_rows(4),
                         processing_class=tokenizer)  # fmt: skip
    assert "DataCollatorForPreference is left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lays its batches out itself"):
        trainer.data_collator = len
    with pytest.raises(ValueError, match="set max_length=9 in DPOConfig"):
        trainer.data_collator = DataCollatorForPreference(0, max_length=9)


def test_the_train_split_of_a_dictionary(tmp_path, tokenizer, capsys):
    splits = DatasetDict(train=Dataset.from_list(chat_rows(3)), test=Dataset.from_list(chat_rows(2)))
    trainer = made(SFTTrainer, tmp_path, tokenizer, rows=splits)
    assert len(trainer.train_dataset) == 3
    assert "`train` is trained on, and not test" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a dictionary of the data sets a, b: pass one of them"):
        made(SFTTrainer, tmp_path, tokenizer, rows={"a": chat_rows(2), "b": chat_rows(2)})


def test_predict_prepares_its_rows(tmp_path, tokenizer):
    trainer = made(SFTTrainer, tmp_path, tokenizer)
    metrics = trainer.predict(chat_rows(4)).metrics
    assert metrics["test_loss"] == pytest.approx(trainer.evaluate(chat_rows(4))["eval_loss"], rel=1e-6)
    trainer = made(SFTTrainer, tmp_path, tokenizer, compute_metrics=lambda p: {"rows": len(p.predictions)})
    found = trainer.predict(chat_rows(4))
    assert found.metrics["test_rows"] == 4 and found.predictions.shape[0] == 4


def test_an_evaluation_step_of_ones_own_keeps_its_loss(tmp_path, tokenizer):
    class Own(SFTTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            assert inputs["labels"].shape == inputs["input_ids"].shape
            return torch.tensor(5.0), None, None

    assert made(Own, tmp_path, tokenizer, eval_rows=chat_rows(3)).evaluate()["eval_loss"] == pytest.approx(5)


# --- hooks and optimizers ---------------------------------------------------------------------------------------------


def test_hooks_of_upstream_are_refused_and_ours_named(tmp_path, tokenizer):
    class Weighted(DPOTrainer):
        def dpo_loss(self, *args):
            return args

    class Judged(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return inputs

    class Helper(DPOTrainer):  # a name for a use of its own
        def dpo_loss(self, *args):
            return args

        def loss(self, model, batch, step):
            return super().loss(model, batch, step)

    class Other(SFTTrainer):  # a name that upstream calls elsewhere
        def dpo_loss(self):
            return None

    config = DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=1)
    data = {"train_dataset": pair_rows(2), "processing_class": tokenizer}
    with pytest.raises(TypeError, match="Weighted.dpo_loss is never called by this library: override `loss`"):
        Weighted(tiny(tokenizer), None, config, **data)
    with pytest.raises(TypeError, match="_generate_and_score_completions is never called .*: override `credit`"):
        Judged(tiny(tokenizer))
    Helper(tiny(tokenizer), None, config, **data)
    made(Other, tmp_path, tokenizer)
    trainer = DPOTrainer(tiny(tokenizer), None, config, **data)
    trainer.concatenated_forward = lambda *args: None
    with pytest.raises(TypeError, match="DPOTrainer.concatenated_forward is never called"):
        trainer.train()


def test_the_hooks_are_not_ours_and_their_replacements_are():
    for name, hooks in HOOKS.items():
        cls = getattr(trl, name, None) or next(part for part in GRPOTrainer.__mro__ if part.__name__ == name)
        ours = [part for part in cls.__mro__ if part.__module__.split(".")[0] == "trl"]
        for hook, (replacements, _) in hooks.items():
            # A public one may be there to be called; what the trainer calls is another.
            assert hook == "compute_ref_log_probs" or not any(hook in vars(part) for part in ours), (name, hook)
            known = {word for part in cls.__mro__ for word in (*vars(part), *vars(part).get("__annotations__", ()))}
            assert set(replacements) <= known, (name, hook)


def test_an_optimizer_over_what_does_not_train(tmp_path, tokenizer, capsys):
    model = tiny(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = SFTConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=1)
    data = {"train_dataset": chat_rows(2), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="the optimizer holds none of the .* parameters that train"):
        SFTTrainer(model, config, optimizers=(optimizer, None), peft_config=LoraConfig(r=2), **data)
    model = tiny(tokenizer)
    head = torch.optim.SGD(model.lm_head.parameters(), lr=1e-3)
    SFTTrainer(model, config, optimizers=(head, None), **data)
    assert "the optimizer holds 1 of the" in capsys.readouterr().out

    class Wrong(SFTTrainer):
        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(tiny(tokenizer).parameters(), lr=1.0)
            return self.optimizer

    trainer = made(Wrong, tmp_path, tokenizer, settings={"max_steps": 1})
    with pytest.raises(ValueError, match="the optimizer holds none of the"):
        trainer.train()


# --- a run that breaks, and a method of one's own -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Reward", "PRM"])
def test_scores_that_are_not_finite_are_named(tmp_path, tokenizer, method):
    model = tiny_scorer(tokenizer, per_token=method == "PRM")
    rows = (step_rows if method == "PRM" else pair_rows)(2)
    trainer = preference(method, tmp_path, model, tokenizer, rows, max_steps=1)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="step 1: the scores of row 0, 1 are not finite"):
        trainer.train()


def test_a_method_of_ones_own_gets_a_card(tmp_path, tokenizer):
    class Mine(SFTTrainer):
        method = "mine"

    made(Mine, tmp_path, tokenizer).save_model(str(tmp_path / "out"))
    assert "the method `mine`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look at its inputs
def test_torch_compile_compiles_what_keeps_its_shape(tmp_path, tokenizer):
    """Batches of other lengths compile nothing anew, and no value changes."""
    from torch._dynamo.utils import counters

    settings = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
    plain = made(SFTTrainer, tmp_path, tokenizer, settings=settings)
    plain.train()
    torch.compiler.reset()
    counters.clear()
    settings.update(torch_compile=True, torch_compile_backend="eager")
    trainer = made(SFTTrainer, tmp_path, tokenizer, settings=settings)
    assert any("torch_compile: 6 parts of layers" in line for line in trainer.report())
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert logged(trainer)["loss"] == pytest.approx(logged(plain)["loss"], rel=1e-5)
