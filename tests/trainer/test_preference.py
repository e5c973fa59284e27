"""What the preference trainers share: where the reference comes from, adapters, evaluation, resuming."""

import contextlib
import json
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl
from tests.trainer.helpers import labelled_rows, pair_rows, preference, step_rows, tiny, tiny_scorer
from trl.engine import reference as engine_reference
from trl.engine.score import score
from trl.losses.tokens import seq_sum


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.reference.reference_cache", lambda: tmp_path / "reference_cache")


def lora(**changes):
    import peft

    settings = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.05, "task_type": "CAUSAL_LM", **changes}
    return peft.LoraConfig(**settings)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A base model, and an adapter on it that has been trained."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    tiny(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = dpo(adapter, str(base), tokenizer, peft_config=lora())
    trainer.train()
    trainer.save_model(str(adapter))
    return base, adapter


def dpo(path, model, tokenizer, rows=None, **settings):
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, **settings}
    return preference("DPO", path, model, tokenizer, pair_rows(8) if rows is None else rows, **settings)


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def first_logps(trainer):
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    with torch.no_grad():
        stats = score(trainer.model.eval(), batch)
    return batch, seq_sum(stats.logp_N, stats.seq_N, stats.sequences)


# --- where the reference comes from -------------------------------------------------------------------------------


def test_a_whole_model_is_copied_as_it_is_at_the_start(tmp_path, tokenizer):
    model = tiny(tokenizer)
    with torch.no_grad():  # not what any folder holds
        model.lm_head.weight.mul_(1.5)
    trainer = dpo(tmp_path, model, tokenizer)
    assert "reference: a frozen copy of the model as it was at the start" in trainer.report()
    batch, start_S = first_logps(trainer)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-5) and losses(trainer)[-1] < 0.69
    stats = trainer.reference.score(trainer.model, batch)
    assert torch.equal(seq_sum(stats.logp_N, stats.seq_N, stats.sequences), start_S)
    assert not any(parameter.requires_grad for parameter in trainer.reference.model.parameters())


def test_a_new_adapter_is_switched_off(tmp_path, tokenizer, folders):
    base, _ = folders
    trainer = dpo(tmp_path, str(base), tokenizer, peft_config=lora())
    assert "reference: the model with its adapter off" in trainer.report()
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    ours = trainer.reference.score(trainer.model, batch).logp_N
    plain = tiny(tokenizer)
    engine_reference.frozen(plain)
    torch.testing.assert_close(ours, score(plain, batch).logp_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("opened_as", ["a folder", "a model with an adapter inside", "a PeftModel"])
def test_a_trained_adapter_gets_a_frozen_twin(tmp_path, tokenizer, folders, opened_as):
    import peft

    base, adapter = folders
    model = str(adapter)
    if opened_as == "a model with an adapter inside":
        model = AutoModelForCausalLM.from_pretrained(adapter)
    if opened_as == "a PeftModel":
        plain = AutoModelForCausalLM.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(plain, adapter, is_trainable=True)
    trainer = dpo(tmp_path, model, tokenizer)
    assert "reference: a frozen copy of the adapter as it was at the start" in trainer.report()
    batch, start_S = first_logps(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any("reference" in name for name in before)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-5) and losses(trainer)[-1] < 0.69
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    stats = trainer.reference.score(trainer.model, batch)
    assert torch.equal(seq_sum(stats.logp_N, stats.seq_N, stats.sequences), start_S)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == before.keys()

    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "reference").exists()
    trainer.model.eval()
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(again(ids).logits, trainer.model(ids).logits)


def test_an_adapter_that_begins_as_part_of_the_weights_gets_a_twin(tmp_path, tokenizer):
    trainer = dpo(tmp_path, tiny(tokenizer), tokenizer, peft_config=lora(init_lora_weights="pissa", lora_dropout=0.0))
    assert "reference: a frozen copy of the adapter as it was at the start" in trainer.report()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize("kind", ["lora, all biases", "lora, its biases", "a norm woken up", "tokens", "ia3", "dora"])
def test_the_reference_stays_whatever_the_adapter_trains(tmp_path, tokenizer, kind):
    import peft

    config = {
        "lora, all biases": lambda: lora(bias="all"),
        "lora, its biases": lambda: lora(bias="lora_only"),
        "a norm woken up": lora,
        "tokens": lambda: lora(trainable_token_indices=list(range(1000))),
        "ia3": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "dora": lambda: lora(use_dora=True),
    }[kind]()
    model = tiny(tokenizer, attention_bias=True)
    if kind == "a norm woken up":
        model = peft.get_peft_model(model, config)
        model.base_model.model.model.norm.weight.requires_grad_(True)
        config = None
    trainer = dpo(tmp_path, model, tokenizer, peft_config=config, learning_rate=5e-2)
    copied = any("because weights beneath the adapter train" in line for line in trainer.report())
    assert copied == (kind not in ("tokens", "ia3", "dora"))
    batch, start_S = first_logps(trainer)
    trainer.train()
    stats = trainer.reference.score(trainer.model, batch)
    ours_S = seq_sum(stats.logp_N, stats.seq_N, stats.sequences)
    torch.testing.assert_close(ours_S, start_S, atol=1e-4, rtol=1e-5)  # DoRA's new adapter rounds
    _, moved_S = first_logps(trainer)
    assert (moved_S - start_S).abs().max() > 1e-3


def test_bco_has_the_rate_of_its_kind():
    assert trl.BCOConfig("out", use_cpu=True).learning_rate == 5e-7


def test_a_model_given_is_the_reference(tmp_path, tokenizer, folders):
    base, adapter = folders
    trainer = dpo(tmp_path, str(adapter), tokenizer, ref_model=str(base))
    assert any("reference: the model given" in line for line in trainer.report())
    trainer.train()
    assert losses(trainer)[0] != pytest.approx(np.log(2), abs=1e-4)


def test_the_policy_cannot_be_its_own_reference(tmp_path, tokenizer):
    model = tiny(tokenizer)
    with pytest.raises(ValueError, match="ref_model is the very model that trains"):
        dpo(tmp_path, model, tokenizer, ref_model=model)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_follows_the_policy_when_asked(tmp_path, tokenizer, folders, adapter):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "max_steps": 2}
    trainer = dpo(tmp_path, str(folders[1] if adapter else folders[0]), tokenizer, **settings)
    assert any("moved 100% of the way to the policy every 2 steps" in line for line in trainer.report())
    batch, start_S = first_logps(trainer)
    trainer.train()
    stats = trainer.reference.score(trainer.model, batch)
    ref_S = seq_sum(stats.logp_N, stats.seq_N, stats.sequences)
    torch.testing.assert_close(ref_S, first_logps(trainer)[1], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(ref_S, start_S, atol=1e-2)


def test_no_reference_where_none_is_asked(tmp_path, tokenizer):
    trainer = dpo(tmp_path, tiny(tokenizer), tokenizer, reference_free=True)
    assert trainer.reference.policy is None and "reference: none" in trainer.report()
    trainer.train()
    with pytest.raises(ValueError, match="no reference is asked"):
        dpo(tmp_path, tiny(tokenizer), tokenizer, reference_free=True, ref_model=tiny(tokenizer))


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_shards_a_reference_of_its_own(tmp_path, tokenizer, monkeypatch, version):
    """Two processes that do so are in tests/distributed; here, who is asked."""
    trainer = dpo(tmp_path, tiny(tokenizer), tokenizer)
    asked = []
    monkeypatch.setattr(
        "trl.trainer.reference.fsdp2_prepare_model", lambda by, model: asked.append(("fsdp2", by, model)) or model
    )
    trainer.is_fsdp_enabled = True
    trainer.accelerator = types.SimpleNamespace(
        is_fsdp2=version == 2,
        autocast=contextlib.nullcontext,
        prepare_model=lambda model: asked.append(("fsdp1", trainer.accelerator, model)) or model,
    )
    model = trainer.reference.model
    trainer.reference.on_ready(trainer)
    [(by, accelerator, sharded)] = asked
    assert by == f"fsdp{version}" and accelerator is trainer.accelerator
    assert sharded is trainer.reference.model and sharded is not model
    # One that is given goes to the device in shards alone.
    trainer.reference.explicit = given = tiny(tokenizer)
    given.to = None
    trainer.reference.on_ready(trainer)
    assert asked[1][0] == f"fsdp{version}" and asked[1][2] is given
    # Weights are not where the data is, and on all ranks but the first perhaps not there at all.
    with pytest.raises(ValueError, match="is not for FSDP, .* run it once in a single process"):
        trainer.reference._computed(trainer, [])


# --- log-probs computed beforehand --------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch):
    """How often a reference was scored."""
    calls = []
    original = engine_reference.Reference.score

    def counted(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(engine_reference.Reference, "score", counted)
    return calls


@pytest.mark.parametrize("method", ["DPO", "KTO", "BCO"])
def test_a_second_run_does_not_forward_the_reference(tmp_path, tokenizer, folders, forwards, method):
    rows = pair_rows(8) if method == "DPO" else labelled_rows(8)

    def run(**settings):
        trainer = preference(
            method, tmp_path, str(folders[1]), tokenizer, rows, per_device_train_batch_size=4, max_steps=3, **settings
        )
        trainer.train()
        return trainer

    plain = run()
    assert len(forwards) == 3
    forwards.clear()
    first = run(precompute_ref_log_probs=True)
    assert len(forwards) == 2 and first.reference.policy is None
    assert "reference: log-probs computed before the first step" in first.report()
    forwards.clear()
    second = run(precompute_ref_log_probs=True)
    assert len(forwards) == 0
    assert losses(second) == losses(first) == pytest.approx(losses(plain), abs=1e-5)
    # Other weights, another reference.
    trainer = preference(method, tmp_path, tiny(tokenizer, seed=3), tokenizer, rows, precompute_ref_log_probs=True,
                         per_device_train_batch_size=8)  # fmt: skip
    assert len(forwards) == 1 and trainer.reference.policy is None


def test_columns_of_the_data_are_taken(tmp_path, tokenizer, forwards):
    rows = [{**row, "ref_chosen_logps": -50.0 - i, "ref_rejected_logps": -40.0} for i, row in enumerate(pair_rows(8))]
    trainer = dpo(tmp_path, tiny(tokenizer), tokenizer, rows)
    assert trainer.reference.is_column and trainer.reference.policy is None
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    chosen = dict(zip(batch["row_S"].tolist()[::2], batch["ref_logp_S"].tolist()[::2], strict=True))
    assert chosen == {i: -50.0 - i for i in range(8)}
    trainer.train()
    assert not forwards


def test_a_stream_is_computed_by_the_shard(tmp_path, tokenizer, folders, forwards):
    from datasets import Dataset

    def run():
        stream = Dataset.from_list(pair_rows(8)).to_iterable_dataset()
        trainer = dpo(tmp_path, str(folders[1]), tokenizer, stream, precompute_ref_log_probs=True, max_steps=2)
        trainer.train()
        return losses(trainer)

    first, count = run(), len(forwards)
    assert count == 2
    assert run() == first and len(forwards) == count


def test_rows_that_come_late_have_no_reference(tmp_path, tokenizer):
    trainer = dpo(tmp_path, tiny(tokenizer), tokenizer, precompute_ref_log_probs=True, eval_rows=pair_rows(4, seed=2))
    trainer.train()
    assert "eval_rewards/accuracies" in trainer.evaluate()
    with pytest.raises(ValueError, match="pass this data set as eval_dataset"):
        trainer.evaluate(pair_rows(4, seed=5))


# --- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["DPO", "KTO", "ORPO", "CPO", "BCO", "Reward", "PRM"])
def test_evaluation_does_not_depend_on_the_batch(tmp_path, tokenizer, method):
    rows = {"KTO": labelled_rows, "BCO": labelled_rows, "PRM": step_rows}.get(method, pair_rows)
    model = tiny_scorer(tokenizer, per_token=method == "PRM") if method in ("Reward", "PRM") else tiny(tokenizer)
    sets = {"one": rows(6, seed=1), "other": rows(5, seed=2)}
    found = []
    for size in (6, 2):
        further = {"ref_model": tiny(tokenizer, seed=1)} if method in ("DPO", "KTO", "BCO") else {}
        trainer = preference(method, tmp_path, model, tokenizer, rows(4), eval_rows=sets,
                             per_device_eval_batch_size=size, **further)  # fmt: skip
        found.append(trainer.evaluate())
    for name, value in found[0].items():
        if name.endswith(("runtime", "second", "preparation_time")):
            continue
        assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert {"eval_one_loss", "eval_other_loss"} <= found[0].keys()


def test_metrics_of_the_users_own(tmp_path, tokenizer):
    def accuracy(prediction):
        labels = prediction.label_ids[:, 1:]
        return {"right": float((prediction.predictions[:, :-1] == labels)[labels != -100].mean())}

    config = trl.DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=3)
    trainer = trl.DPOTrainer(
        tiny(tokenizer), None, config, train_dataset=pair_rows(4), eval_dataset=pair_rows(6, seed=1),
        processing_class=tokenizer, compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    assert 0 <= trainer.evaluate()["eval_right"] <= 1


def test_answers_are_written_at_an_evaluation(tmp_path, tokenizer):
    trainer = dpo(tmp_path, tiny(tokenizer), tokenizer, eval_rows=pair_rows(3, seed=1), generate_during_eval=True,
                  max_completion_length=5)  # fmt: skip
    trainer.evaluate()
    lines = (tmp_path / "answers" / "step-0.jsonl").read_text().splitlines()
    assert len(lines) == 3 and set(json.loads(lines[0])) == {"prompt", "answer"}


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 2}), ("KTO", {}), ("BCO", {}), ("Reward", {})],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer, folders, method, settings):
    rows = labelled_rows(8) if method in ("KTO", "BCO") else pair_rows(8)

    def make(path):
        torch.manual_seed(0)
        if method == "Reward":
            model, adapter = tiny_scorer(tokenizer), lora(task_type="SEQ_CLS")
        else:
            model, adapter = str(folders[1]), None
        return preference(
            method, path, model, tokenizer, rows, peft_config=adapter, disable_dropout=False, max_steps=6,
            per_device_train_batch_size=3, save_strategy="steps", save_steps=3, **settings,
        )  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# --- one method at a time -----------------------------------------------------------------------------------------


def test_kto_takes_single_rows_and_pairs(tmp_path, tokenizer):
    trainer = preference("KTO", tmp_path, tiny(tokenizer), tokenizer, labelled_rows(6), per_device_train_batch_size=1,
                         ref_model=tiny(tokenizer, seed=1), max_steps=2)  # fmt: skip
    trainer.train()
    assert "kl" in trainer.state.log_history[0]
    trainer = preference("KTO", tmp_path, tiny(tokenizer), tokenizer, pair_rows(6), max_steps=1)
    assert len(trainer.train_dataset) == 12
    trainer.train()


def test_mismatched_completions_are_of_other_prompts():
    from datasets import Dataset

    from trl.data.tokenizing.mismatched import mismatched

    prompts = [[1, index // 3] for index in range(12)]
    rows = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": [[7, index, 9] for index in range(12)]})
    drawn = mismatched(rows, seed=0, max_length=4)
    others = [row["kl_completion_ids"] for row in drawn]
    assert all(len(other) == 2 for other in others)  # two tokens of prompt, two of the window are left
    assert all(other[1] // 3 != index // 3 for index, other in enumerate(others))
    assert others == [row["kl_completion_ids"] for row in mismatched(rows, seed=0, max_length=4)]
    assert others != [row["kl_completion_ids"] for row in mismatched(rows, seed=1, max_length=4)]
    stream = mismatched(rows.to_iterable_dataset(), seed=0, max_length=4)
    assert [row["kl_completion_ids"] for row in stream] == others


def test_bco_weighs_bad_completions_by_their_prompts(tmp_path, tokenizer):
    pytest.importorskip("sklearn")

    def embed(input_ids, attention_mask):
        return torch.stack([input_ids.float().mean(1), attention_mask.float().sum(1)], 1)

    config = trl.BCOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1, logging_steps=1,
                           save_strategy="no", min_density_ratio=0.9, max_density_ratio=1.1)  # fmt: skip
    trainer = trl.BCOTrainer(tiny(tokenizer), None, config, train_dataset=labelled_rows(9), processing_class=tokenizer,
                             embedding_func=embed)  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(9)])
    weight_S = trainer._weights(batch, torch.zeros(9))
    assert (weight_S[batch["label_S"]] == 1).all()
    assert ((weight_S >= 0.9) & (weight_S <= 1.1)).all()
    trainer.train()


def test_a_reward_model_from_a_language_model(tmp_path, tokenizer, folders):
    trainer = preference("Reward", tmp_path, str(folders[1]), tokenizer, pair_rows(8), max_steps=4,
                         peft_config=lora(lora_dropout=0.0), per_device_train_batch_size=8)  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in before)
    trainer.train()
    assert trainer.state.log_history[3]["accuracy"] > trainer.state.log_history[0]["accuracy"]
    assert trainer.state.log_history[3]["loss"] < trainer.state.log_history[0]["loss"]
    trainer.save_model(str(tmp_path / "saved"))

    import peft

    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1).eval()
    assert any("score.modules_to_save" in name for name, _ in again.named_parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_scores_are_those_of_transformers(tokenizer, family):
    from transformers import MistralConfig, Qwen2Config

    from trl.data.batching.collate import Branch, Tree
    from trl.engine.probe import attach
    from trl.engine.scalar import scalars

    torch.manual_seed(0)
    kind = {"qwen2": Qwen2Config, "mistral": MistralConfig}.get(family)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 1}  # fmt: skip
    if kind is None:
        model = tiny_scorer(tokenizer)
    else:
        model = AutoModelForSequenceClassification.from_config(kind(**sizes))
    prompt, ends = [3, 4, 5], ([6], [7, 8, 9, 10])
    branches = tuple(Branch(end, [False] * (len(end) - 1) + [True]) for end in ends)
    attachment = attach(model.eval())
    assert attachment.is_flat
    ours = scalars(model, attachment.batch([Tree(Branch(prompt, [False] * 3), branches)]))[:, 0]
    theirs = [model(input_ids=torch.tensor([prompt + end]), use_cache=False).logits[0, 0] for end in ends]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-5)


def test_a_reference_for_loops_of_ones_own(tokenizer):
    from types import SimpleNamespace

    policy = tiny(tokenizer)
    copy = trl.create_reference_model(policy)
    assert not any(parameter.requires_grad for parameter in copy.parameters()) and not copy.training
    with torch.no_grad():
        policy.lm_head.weight += 1.0
    arguments = SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.25)
    before = copy.lm_head.weight.clone()
    callback = trl.SyncRefModelCallback(copy)
    callback.on_step_end(arguments, SimpleNamespace(global_step=1), None, model=policy)
    assert torch.equal(copy.lm_head.weight, before)
    callback.on_step_end(arguments, SimpleNamespace(global_step=2), None, model=policy)
    torch.testing.assert_close(copy.lm_head.weight, before + 0.25)


def test_collators_are_refused(tmp_path, tokenizer):
    config = trl.DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="lays its batches out itself"):
        trl.DPOTrainer(tiny(tokenizer), None, config, data_collator=len, train_dataset=pair_rows(4),
                       processing_class=tokenizer)  # fmt: skip


@pytest.mark.parametrize("method", ["DPO", "KTO", "ORPO", "CPO", "BCO", "Reward", "PRM"])
def test_no_token_is_computed_twice(tmp_path, tokenizer, method):
    """With an adapter and its dropout, as the commands have them by default."""
    rows = {"KTO": labelled_rows, "BCO": labelled_rows, "PRM": step_rows}.get(method, pair_rows)
    model = tiny_scorer(tokenizer, per_token=method == "PRM") if method in ("Reward", "PRM") else tiny(tokenizer)
    trainer = preference(method, tmp_path, model, tokenizer, rows(8), peft_config=lora(), disable_dropout=False,
                         max_steps=2, per_device_train_batch_size=4)  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-1]["train_token_efficiency"] == 1.0
