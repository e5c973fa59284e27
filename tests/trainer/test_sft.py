"""SFT with values: what the losses are, what is reported, what is refused."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.helpers import chat_rows, sft, tiny
from trl import SFTConfig, SFTTrainer
from trl.trainer.nonfinite import NonFiniteError


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def lora(**settings):
    import peft

    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def naive_losses(model, prepared):
    """Sum of the negative log-likelihood and count of trained tokens, from plain full logits, row by row."""
    total, count = 0.0, 0
    for row in prepared:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"]).bool()
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask[1:]]
        total, count = total + nll.sum().item(), count + len(nll)
    return total, count


def test_the_logged_loss_is_the_mean_over_trained_tokens(tmp_path, tokenizer):
    model = tiny(tokenizer)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(6), eval_rows=chat_rows(5, seed=1), max_steps=1,
                  per_device_train_batch_size=6, per_device_eval_batch_size=2)  # fmt: skip
    with torch.no_grad():
        total, count = naive_losses(model, trainer.train_dataset)
        eval_total, eval_count = naive_losses(model, trainer.eval_dataset)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(eval_total / eval_count, rel=1e-5)
    assert 0 < found["eval_entropy"] < 11 and 0 <= found["eval_mean_token_accuracy"] <= 1
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_does_not_depend_on_the_batch_and_takes_raw_rows(tmp_path, tokenizer):
    model = tiny(tokenizer)
    found = []
    for size in (1, 3, 16):
        trainer = sft(tmp_path, model, tokenizer, chat_rows(2), per_device_eval_batch_size=size)
        found.append(trainer.evaluate(chat_rows(7, seed=3))["eval_loss"])
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)


def test_several_evaluation_sets(tmp_path, tokenizer):
    trainer = sft(
        tmp_path, tiny(tokenizer), tokenizer, chat_rows(2), eval_rows={"a": chat_rows(2, 1), "b": chat_rows(3, 2)}
    )
    found = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= set(found) and found["eval_a_loss"] != found["eval_b_loss"]


def test_a_few_steps_learn_the_rows(tmp_path, tokenizer):
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), max_steps=30, per_device_train_batch_size=4)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] > 7 and losses[-1] < 3


def test_dft_weighs_by_the_likelihood(tmp_path, tokenizer):
    model = tiny(tokenizer)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(3), loss_type="dft", max_steps=1, per_device_train_batch_size=3)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    total = trainer.loss(model, batch, trainer.step_for(batch))[0]["tokens"]
    from trl.engine.score import score

    logp_N = score(model, batch).logp_N
    assert total.item() == pytest.approx(-(logp_N.exp() * logp_N).sum().item(), rel=1e-5)


def test_an_adapter_is_saved_and_opens_in_plain_peft(tmp_path, tokenizer, tiny_path):
    import peft

    trainer = sft(tmp_path, tiny_path, None, chat_rows(4), peft_config=lora(), max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), tmp_path / "final")
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template


def test_an_adapter_folder_is_a_model_and_trains_on(tmp_path, tiny_path):
    trainer = sft(tmp_path, tiny_path, None, chat_rows(4), peft_config=lora(), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "first"))
    second = sft(tmp_path / "run", str(tmp_path / "first"), None, chat_rows(4), max_steps=2)
    before = {name: p.detach().clone() for name, p in second.model.named_parameters() if p.requires_grad}
    assert before and all("lora" in name for name in before)
    second.train()
    assert all(not torch.equal(p, before[name]) for name, p in second.model.named_parameters() if name in before)


def test_nothing_to_train_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="0 of .* parameters would train. Set requires_grad"):
        sft(tmp_path, tiny(tokenizer).requires_grad_(False), tokenizer, chat_rows(2))


def test_an_adapter_that_transformers_loaded_frozen_is_woken(tmp_path, tokenizer, tiny_path):
    """`AutoModelForCausalLM.from_pretrained(adapter_folder)` has nothing to train, and says nothing."""
    trainer = sft(tmp_path, tiny_path, None, chat_rows(2), peft_config=lora(), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    injected = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in injected.parameters())
    second = sft(tmp_path / "run", injected, tokenizer, chat_rows(2), max_steps=1)
    before = {name: p.detach().clone() for name, p in injected.named_parameters() if p.requires_grad}
    assert before and all("lora" in name for name in before)
    second.train()
    assert all(not torch.equal(p, before[name]) for name, p in injected.named_parameters() if name in before)


def test_a_loss_that_is_not_finite_names_the_row_and_spares_the_weights(tmp_path, tokenizer):
    model = tiny(tokenizer)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(5), max_steps=3, per_device_train_batch_size=5)
    poisoned = trainer.train_dataset[3]["input_ids"][-2]
    before = model.lm_head.weight.detach().clone()
    rare = "zygote"  # a token that only row 3 has
    rows = chat_rows(5)
    rows[3]["messages"][1]["content"] = rare
    trainer = sft(tmp_path, model, tokenizer, rows, max_steps=3, per_device_train_batch_size=5)
    token = tokenizer(rare)["input_ids"][0]
    assert poisoned != token
    model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 1: the log-probs of row 3 are not finite. Lower the learning rate"):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)


def test_a_gradient_that_is_not_finite_is_named(tmp_path, tokenizer):
    model = tiny(tokenizer)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(2), max_steps=3, per_device_train_batch_size=2)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"the gradient of model.norm.weight \(and 0 more\) is not finite"):
        trainer.train()


def test_data_parallel_is_never_entered(tmp_path, tokenizer, monkeypatch, capsys):
    config = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    config._n_gpu = 2
    monkeypatch.setattr("trl.notices._printed", set())
    trainer = SFTTrainer(tiny(tokenizer), config, train_dataset=chat_rows(2), processing_class=tokenizer)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == config.per_device_train_batch_size
    assert "accelerate launch" in capsys.readouterr().out


def test_bf16_runs_on_the_cpu_and_is_said_once(tmp_path, tokenizer, monkeypatch, capsys):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    monkeypatch.setattr("trl.notices._printed", set())
    first, second = (SFTConfig(output_dir=str(tmp_path), bf16=True, report_to="none", max_steps=2) for _ in range(2))
    assert capsys.readouterr().out.count("bf16=True runs on the CPU") == 1
    assert first.use_cpu and second.mixed_precision == "bf16"
    trainer = SFTTrainer(tiny(tokenizer), first, train_dataset=chat_rows(4), processing_class=tokenizer)
    dtypes = set()
    trainer.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
    dtypes.clear()
    trainer.train()
    assert dtypes == {torch.bfloat16} and trainer.model.lm_head.weight.dtype == torch.float32


def test_the_report_comes_before_the_first_step_and_is_kept(tmp_path, tokenizer, capsys):
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(6), peft_config=lora(), max_steps=2, logging_steps=1)
    capsys.readouterr()
    trainer.train()
    out = capsys.readouterr().out
    report = out[: out.index("loss=")]
    assert "6 rows read" in report and "end of turn" in report
    assert "parameters train" in report and "flat rows, no padding" in report
    assert "steps: 2, each on 8 rows (8 a batch × 1 accumulated × 1 process)" in report
    kept = json.loads((tmp_path / "data_report.json").read_text())
    assert kept["train"]["rows_read"] == 6


def test_the_report_says_what_bfloat16_weights_cost(tmp_path, tokenizer):
    trainer = sft(tmp_path, tiny(tokenizer).bfloat16(), tokenizer, chat_rows(2))
    assert any(line.startswith("updates: in float32") and "2 bytes a weight" in line for line in trainer.report())
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(2))
    assert not any(line.startswith("updates:") for line in trainer.report())


def test_a_users_collator_is_laid_out_flat(tmp_path, tokenizer):
    """`input_ids`, `labels` and `attention_mask` as collators of transformers make them."""

    def collator(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length], mask[number, :length] = torch.tensor(row["input_ids"]), 1
            keep = torch.tensor(row["loss_mask"]).bool()
            labels[number, :length][keep] = ids[number, :length][keep]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    settings = {"max_steps": 2, "per_device_train_batch_size": 3}
    ours = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(6), **settings)
    config = ours.args
    ours.train()
    theirs = SFTTrainer(
        tiny(tokenizer), config, data_collator=collator, train_dataset=chat_rows(6), processing_class=tokenizer
    )
    theirs.train()
    assert [line.get("loss") for line in theirs.state.log_history] == [
        line.get("loss") for line in ours.state.log_history
    ]


def test_workers_that_prepare_batches(tmp_path, tokenizer):
    def run(workers):
        trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(8), max_steps=3, dataloader_num_workers=workers)
        trainer.train()
        return [line.get("loss") for line in trainer.state.log_history]

    assert run(2) == run(0)


def test_a_longer_row_is_cut_and_counted(tmp_path, tokenizer):
    rows = chat_rows(3)
    rows.append({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "cat " * 100}]})
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, rows, max_length=120)
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 120
    assert trainer.reports["train"].rows_cut == 1 and trainer.reports["train"].tokens_cut > 0
    whole = sft(tmp_path, tiny(tokenizer, max_position_embeddings=130), tokenizer, rows)
    assert whole.window() == 130 and whole.reports["train"].rows_cut == 1


def test_the_epoch_order_is_a_permutation_and_changes(tmp_path, tokenizer):
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(7), per_device_train_batch_size=3)
    loader = trainer.get_train_dataloader()
    first = [row for batch in loader for row in batch["row_S"].tolist()]
    loader.batch_sampler.set_epoch(1)
    second = [row for batch in loader for row in batch["row_S"].tolist()]
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert [len(batch["row_S"]) for batch in loader] == [3, 3, 1]


def test_an_unknown_token_name_is_refused(tmp_path, tokenizer, small_path):
    own = AutoTokenizer.from_pretrained(small_path)
    with pytest.raises(ValueError, match="eos_token='<nowhere>' is not in the tokenizer's vocabulary"):
        sft(tmp_path, tiny(tokenizer), own, chat_rows(2), eos_token="<nowhere>")


def test_a_model_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no model folder at ./nowhere"):
        sft(tmp_path, "./nowhere", None, chat_rows(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a saved model"):
        sft(tmp_path, str(tmp_path / "empty"), None, chat_rows(2))


def test_an_unknown_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type='nlll' is not one of nll, dft"):
        SFTConfig(output_dir=str(tmp_path), loss_type="nlll")


def test_label_smoothing_is_the_one_of_transformers(tmp_path, tokenizer):
    from transformers.trainer_pt_utils import LabelSmoother

    from trl.engine.forest import padded, with_labels

    model = tiny(tokenizer)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(4), label_smoothing_factor=0.2)
    rows = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(rows)
    ours = trainer.loss(model, batch, trainer.step_for(batch))[0]["tokens"]
    batch = with_labels(trainer.batch(rows, padded))
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    theirs = LabelSmoother(epsilon=0.2)(outputs, batch["labels"], shift_labels=True) * (batch["labels"] != -100).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    wanted = list(model.parameters())
    for mine, expected in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine / scale, expected / scale, atol=1e-4, rtol=0)


def test_neftune_noise_in_training_alone(tmp_path, tokenizer):
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), neftune_noise_alpha=5.0, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    step = trainer.step_for(batch)
    evaluated = [trainer.loss(trainer.model.eval(), batch, step)[0]["tokens"].item() for _ in range(2)]
    trained = [trainer.loss(trainer.model.train(), batch, step)[0]["tokens"].item() for _ in range(2)]
    assert evaluated[0] == evaluated[1] and len({*trained, evaluated[0]}) == 3
    trainer.train()


def test_the_load_balancing_term_of_a_mixture_of_experts(tmp_path, tokenizer):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=len(tokenizer), hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
                       pad_token_id=2)
    )  # fmt: skip
    trainer = sft(tmp_path, model, tokenizer, chat_rows(3), router_aux_loss_coef=0.5, max_steps=1,
                  per_device_train_batch_size=3)  # fmt: skip
    rows = [trainer.train_dataset[index] for index in range(3)]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        sums, metrics = trainer.loss(model, batch, trainer.step_for(batch))
        trainer.args.router_aux_loss_coef = 0.0
        plain = trainer.loss(model, batch, trainer.step_for(batch))[0]["tokens"]
        routed = [
            model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True).router_logits for row in rows
        ]
    expected = load_balancing_loss_func(tuple(torch.cat(layer) for layer in zip(*routed, strict=True)), 4, 2)
    assert metrics["aux_loss"].total.item() == pytest.approx(expected.item(), rel=1e-5)
    with_balance = plain.item() + 0.5 * expected.item() * trainer.counts(batch)["tokens"]
    assert sums["tokens"].item() == pytest.approx(with_balance, rel=1e-5)
    trainer.args.router_aux_loss_coef = 0.5
    trainer.train()
    assert "aux_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_compute_metrics_gets_predictions_of_every_row(tmp_path, tokenizer, batch_size):
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        keep = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[keep].mean())}

    trainer = sft(
        tmp_path, tiny(tokenizer), tokenizer, chat_rows(5), max_steps=25, per_device_eval_batch_size=batch_size
    )
    trainer.train()
    config = trainer.args
    trainer = SFTTrainer(
        trainer.model, config, train_dataset=chat_rows(5), eval_dataset=chat_rows(5), processing_class=tokenizer,
        compute_metrics=metrics, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_accuracy"] == pytest.approx(found["eval_mean_token_accuracy"], abs=1e-6)
    assert seen[0][0] == seen[0][1] and seen[0][0][0] == 5


def test_compute_metrics_never_hoards_logits(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("trl.trainer.evaluation.LARGEST_KEPT_LOGITS", 1000)
    trainer = SFTTrainer(
        tiny(tokenizer), sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(2)).args, eval_dataset=chat_rows(3),
        processing_class=tokenizer, compute_metrics=lambda prediction: {},
    )  # fmt: skip
    with pytest.raises(ValueError, match="would keep .* GiB of logits .* preprocess_logits_for_metrics"):
        trainer.evaluate()


def test_a_loss_function_of_the_users_own(tmp_path, tokenizer):
    """It sees the logits and labels that transformers would give it, and trains as the built-in loss does."""

    def own(outputs, labels, num_items_in_batch):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return (
            torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch
        )

    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(8), **settings)
    custom = SFTTrainer(
        tiny(tokenizer), plain.args, train_dataset=chat_rows(8), processing_class=tokenizer, compute_loss_func=own
    )
    assert any("compute_loss_func" in line for line in custom.report())
    plain.train()
    custom.train()
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (plain, custom)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_selective_checkpointing_and_offloading_change_no_value(tmp_path, tokenizer):
    from tests.trainer.helpers import first_gradient

    settings = {"max_steps": 1, "per_device_train_batch_size": 4}
    expected = first_gradient(sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), **settings))
    for change in ({"gradient_checkpointing_kwargs": {"selective": True}}, {"activation_offloading": True}):
        gradient = first_gradient(sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), **settings, **change))
        for name, value in expected.items():
            torch.testing.assert_close(gradient[name], value, atol=1e-6, rtol=1e-5, msg=f"{change} {name}")


def test_the_model_card_says_what_was_done(tmp_path, tokenizer, tiny_path):
    trainer = sft(tmp_path, tiny_path, None, chat_rows(4), peft_config=lora(), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text()
    assert "library_name: peft" in card and "4 rows read" in card and "| learning rate | 0.01 |" in card
    assert "AutoPeftModelForCausalLM" in card
    trainer.method = "of my own"
    trainer.create_model_card("me/model", "me/data", ["first", "second"], license="mit", folder=str(tmp_path / "named"))
    card = (tmp_path / "named" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "datasets": "me/data",
        "library_name": "peft",
        "model_name": "me/model",
        "license": "mit",
        "tags": ["generated_from_trainer", "trl", "of my own", "first", "second"],
    }
    assert "trained by the method `of my own`" in card and 'from_pretrained("me/model")' in card
    cards = []
    trainer.create_model_card = lambda model_name=None, dataset_name=None, tags=None: cards.append(model_name)
    trainer.save_model(str(tmp_path / "again"))
    assert cards == [None] and (tmp_path / "again" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_rows_give_the_loss_and_gradient_of_the_rows_alone(tmp_path, tokenizer, strategy):
    from tests.trainer.helpers import first_gradient

    rows = chat_rows(16)
    alone = sft(tmp_path, tiny(tokenizer), tokenizer, rows, per_device_train_batch_size=16, max_steps=1)
    expected = first_gradient(alone)
    packed = sft(tmp_path, tiny(tokenizer), tokenizer, rows, per_device_train_batch_size=16, max_steps=1, packing=True,
                 packing_strategy=strategy, max_length=128)  # fmt: skip
    assert len(packed.train_dataset) < 16 and packed.reports["train"].packing.rows == 16
    gradient = first_gradient(packed)
    for key in ("loss", "entropy", "num_tokens"):
        assert packed.state.log_history[0][key] == pytest.approx(alone.state.log_history[0][key], rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_packing_does_not_reach_evaluation_when_told_so(tmp_path, tokenizer):
    settings = {"packing": True, "max_length": 256, "eval_rows": chat_rows(6, seed=2)}
    packed = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(8), **settings)
    plain = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(8), eval_packing=False, **settings)
    assert len(packed.eval_dataset) < 6 == len(plain.eval_dataset)
    assert packed.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_a_formatting_function(tmp_path, tokenizer):
    rows = [{"q": "cat", "a": "mat"}, {"q": "red", "a": "bird"}]
    config = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(1), assistant_only_loss=False).args
    trainer = SFTTrainer(tiny(tokenizer), config, train_dataset=rows, processing_class=tokenizer,
                         formatting_func=lambda row: f"{row['q']} -> {row['a']}")  # fmt: skip
    assert tokenizer.decode(trainer.train_dataset[1]["input_ids"]) == "red -> bird<|im_end|>"


def stream_of(rows):
    from datasets import Dataset

    return Dataset.from_list(rows).to_iterable_dataset()


def test_a_stream_trains_as_the_rows_in_their_order(tmp_path, tokenizer):
    rows = chat_rows(10)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    losses = []
    for data in (rows, stream_of(rows)):
        trainer = sft(tmp_path, tiny(tokenizer), tokenizer, data, **settings)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_resumed_stream_goes_on_where_it_was(tmp_path, tokenizer):
    def run(path):
        settings = {"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 2, "logging_steps": 3}
        return sft(path, tiny(tokenizer), tokenizer, stream_of(chat_rows(20)), save_strategy="steps", **settings)

    whole, resumed = run(tmp_path / "whole"), run(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    logs = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_a_mixture_of_data_sets(tmp_path, tokenizer):
    from trl.data.mixture import load_mixture

    first, second = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(4)))
    second.write_text("".join(json.dumps({"prompt": "cat", "completion": f" mat {n}"}) + "\n" for n in range(6)))
    mixture = load_mixture([{"path": str(first)}, {"path": str(second), "fraction": 0.5}])["train"]
    trainer = sft(tmp_path / "out", tiny(tokenizer), tokenizer, mixture, max_steps=2, assistant_only_loss=False)
    assert len(trainer.train_dataset) == 7 and len(trainer.reports["train"].parts) == 2
    trainer.train()


def test_a_stream_cannot_be_packed(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="packing looks at all rows at once"):
        sft(tmp_path, tiny(tokenizer), tokenizer, stream_of(chat_rows(4)), packing=True, max_length=64, max_steps=1)


def test_rows_for_a_collator_of_the_users_own(tmp_path, tokenizer):
    def collator(rows):
        ids = [tokenizer(row["raw"])["input_ids"] for row in rows]
        width = max(map(len, ids))
        grid = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        return {"input_ids": grid, "labels": grid.masked_fill(mask == 0, -100), "attention_mask": mask}

    rows = [{"raw": "the cat"}, {"raw": "a red bird flies"}]
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 1, "assistant_only_loss": False}
    config = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(1), **settings).args
    trainer = SFTTrainer(tiny(tokenizer), config, collator, rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] == sum(len(tokenizer(row["raw"])["input_ids"]) for row in rows)
    with pytest.raises(ValueError, match="dataset_kwargs understands skip_prepare_dataset alone, not add_eos"):
        sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(1), dataset_kwargs={"add_eos": True})
