"""GKD, Distillation and MiniLLM: whose words are trained on, what the loss is, and what is refused."""

import contextlib
import io
import json

import numpy as np
import peft
import pytest
import torch
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import DEFAULTS, chat_rows, first_gradient, tiny
from tests.trainer.test_online import PROMPTS, Canned
from trl.data.reading.errors import DataError
from trl.rollout.traces import TrainingTrace

METHODS = ("GKD", "Distillation", "MiniLLM")
KIND = {"GKD": {}, "Distillation": {"beta": 0.5}, "MiniLLM": {"num_generations": 2, "gamma": 0.9}}


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def make(path, tokenizer, method="GKD", rows=None, model=None, teacher=None, peft_config=None, eval_rows=None,
         canned=True, **more):  # fmt: skip
    """A trainer with a teacher that is larger than the student. `canned`: tokens are drawn by the seed alone."""
    own = {"max_new_tokens": 8} if method == "GKD" else {"max_completion_length": 8}
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, "output_dir": str(path),
        **own, **KIND[method], **more,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = getattr(trl, f"{method}Trainer")(
            model=model or tiny(tokenizer),
            teacher_model=teacher or tiny(tokenizer, seed=1, hidden_size=48),
            args=getattr(trl, f"{method}Config")(**{**DEFAULTS, **settings}),
            train_dataset=rows or (chat_rows(16) if method == "GKD" else PROMPTS),
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    if not canned:
        return trainer
    if method == "GKD":
        trainer.samplers = dict.fromkeys(trainer.samplers, Canned())
    else:
        trainer.sampler = Canned()
    return trainer


def run(*args, **settings):
    trainer = make(*args, **settings)
    return first_gradient(trainer), trainer.state.log_history[0]


@pytest.mark.parametrize(("method", "more"), [
    ("GKD", {"lmbda": 1.0}), ("GKD", {"lmbda": 0.0, "seq_kd": True}), ("Distillation", {}),
    ("Distillation", {"loss_top_k": 5}), ("MiniLLM", {}), ("MiniLLM", {"kd_temperature": 2.0, "loss_type": "grpo"}),
])  # fmt: skip
def test_the_gradient_does_not_depend_on_the_split(tmp_path, tokenizer, method, more):
    expected, line = run(tmp_path, tokenizer, method, **more)
    assert expected and all(gradient.abs().sum() > 0 for gradient in expected.values())
    budget = [] if method == "GKD" else [{"max_tokens_per_micro_batch": 1}, {"max_tokens_per_micro_batch": 40}]
    for settings in [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
                     {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
                     {"share_prompt": False}, *budget]:  # fmt: skip
        ours, other = run(tmp_path, tokenizer, method, **more, **settings)
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5, abs=1e-6), settings
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=f"{settings} {name}")


@pytest.mark.parametrize("method", METHODS)
def test_the_divergence_falls(tmp_path, tokenizer, method):
    more = {"rkl_advantage": False} if method == "MiniLLM" else {}  # its reward is noise where others draw
    trainer = make(tmp_path, tokenizer, method, max_steps=12, **more)
    trainer.train()
    name = "teacher_divergence" if method == "MiniLLM" else "loss"
    found = [line[name] for line in trainer.state.log_history if name in line]
    assert len(found) == 12 and np.mean(found[-3:]) < 0.8 * found[0], found


def test_who_writes_the_answers(tmp_path, tokenizer):
    """The student in a share of the steps, the teacher or the data in the others; the same on every rank and resume."""
    for seq_kd, other in ((False, None), (True, "teacher")):
        trainer = make(tmp_path, tokenizer, lmbda=0.3, seq_kd=seq_kd)
        writers = []
        for step in range(400):
            trainer.state.global_step = step
            writers.append(trainer._writer())
        assert set(writers) == {"student", other}
        assert writers.count("student") / 400 == pytest.approx(0.3, abs=0.07)
    assert make(tmp_path, tokenizer, lmbda=0.0)._writer() is None
    assert make(tmp_path, tokenizer, lmbda=1.0, seq_kd=True)._writer() == "student"


def test_written_answers_follow_the_prompt_of_each_row(tmp_path, tokenizer):
    """The prompt ends where the last answer began, also in a conversation of several turns."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    rows = [{"messages": turns}, {"messages": chat_rows(1)[0]["messages"]}]
    trainer = make(tmp_path, tokenizer, rows=rows, lmbda=1.0, per_device_train_batch_size=2)
    trainer.model_wrapped, asked = trainer.model, []
    canned = trainer.samplers["student"]
    original = canned.generate
    canned.generate = lambda requests, sampling: asked.extend(requests) or original(requests, sampling)
    [batch] = trainer.rewritten([trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])], True)
    for request, row in zip(asked, rows, strict=True):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(request.prompt_ids) == prompt
    assert "trees" not in batch and len(set(batch["seq_N"].tolist())) == 2
    drawn = [completion.ids for (completion,) in original(asked, trainer.sampling)]
    assert batch["target_N"].tolist() == [token for ids in drawn for token in ids]


def test_an_evaluation_reads_the_data(tmp_path, tokenizer):
    rows = chat_rows(6, seed=3)
    trainer = make(tmp_path, tokenizer, lmbda=1.0, seq_kd=True, eval_rows=rows)
    trainer.samplers = None
    whole = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 1
    single = trainer.evaluate()
    assert whole["eval_loss"] == pytest.approx(single["eval_loss"], rel=1e-5) and whole["eval_loss"] > 0
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= whole.keys()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_and_half_precision(tmp_path, tokenizer, method):
    """The teacher is in no checkpoint."""
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4)
    for bf16 in (False, True):
        trainer = make(tmp_path / f"{method}{bf16}", tokenizer, method, peft_config=config, bf16=bf16, max_steps=2)
        trainer.train()
        assert all(np.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
        assert all(not parameter.requires_grad for parameter in trainer.teacher_model.parameters())
        trainer.save_model()
    names = {path.name for path in (tmp_path / f"{method}False").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    expected, _ = run(tmp_path, tokenizer, method)
    half = tiny(tokenizer).bfloat16()
    ours, _ = run(tmp_path, tokenizer, method, model=half, teacher=tiny(tokenizer, 1, hidden_size=48).bfloat16())
    name = "model.layers.0.self_attn.q_proj.weight"
    cosine = torch.nn.functional.cosine_similarity(ours[name].float().flatten(), expected[name].flatten(), 0)
    assert cosine > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer, method):
    """Also in the middle of a round."""
    more = {"lmbda": 0.5} if method == "GKD" else {"steps_per_generation": 4}
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **more}
    whole = make(tmp_path / "whole", tokenizer, method, **settings)
    whole.train()
    again = make(tmp_path / "again", tokenizer, method, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    clocks = ("step_time", "train_token_efficiency")
    lines = [
        [{k: v for k, v in line.items() if k not in clocks} for line in each.state.log_history if "loss" in line]
        for each in (whole, again)
    ]
    assert lines[0] == lines[1]


def test_minillm_without_later_rewards_equals_its_terms_by_hand(tmp_path, tokenizer):
    """The policy gradient of r_t = log p - log q with r_t held fixed, plus the mean reverse KL."""
    trainer = make(tmp_path, tokenizer, "MiniLLM", gamma=0.0, num_generations=1)
    ids = [[5, 9, 12, 20], [7, 8]]
    traces = [
        TrainingTrace(index, np.array([30 + index, 40]), len(each), 0.0, len(each),
                      {"ids": np.array(each, dtype=np.int32), "logps": np.zeros(len(each), dtype=np.float32)})
        for index, each in enumerate(ids)
    ]  # fmt: skip
    loss = trainer.train_on(trainer.model, traces)
    ours = {name: each.grad.clone() for name, each in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    total, expected, count = 0.0, 0.0, sum(map(len, ids))
    for index, each in enumerate(ids):
        row = torch.tensor([[30 + index, 40, *each]])
        lq = trainer.model(row).logits[0, 1:-1].log_softmax(-1)
        lp = trainer.teacher_model(row).logits[0, 1:-1].log_softmax(-1).detach()
        own = torch.tensor(each)[:, None]
        reward_N = (lp - lq).gather(1, own)[:, 0].detach()
        divergence = (lq.exp() * (lq - lp)).sum()
        total = total - (reward_N * lq.gather(1, own)[:, 0]).sum() / count + divergence / count
        expected += float((divergence - reward_N.sum()).detach()) / count
    total.backward()
    for name, each in trainer.model.named_parameters():
        torch.testing.assert_close(ours[name], each.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_refused(tmp_path, tokenizer):
    student = tiny(tokenizer)
    for method in METHODS:
        with pytest.raises(ValueError, match="teacher_model is missing: pass a model, a name or a path"):
            getattr(trl, f"{method}Trainer")(student, args=None, train_dataset=PROMPTS, processing_class=tokenizer)
        with pytest.raises(ValueError, match="teacher_model is the very model that trains"):
            make(tmp_path, tokenizer, method, model=student, teacher=student)
        with pytest.raises(ValueError, match="teacher_model_init_kwargs is for a teacher given by name"):
            make(tmp_path, tokenizer, method, teacher_model_init_kwargs={"dtype": "float32"})
        with pytest.raises(ValueError, match=r"predicts 100 tokens and the student 2,0\d\d"):
            small = tiny(tokenizer, vocab_size=100, pad_token_id=0, bos_token_id=0, eos_token_id=0)
            make(tmp_path, tokenizer, method, teacher=small)
    with pytest.raises(ValueError, match="beta=2"):
        trl.DistillationConfig(output_dir=str(tmp_path), beta=2)
    with pytest.raises(ValueError, match="lmbda=1.5 is not possible: give a number, 0 or more, at most 1"):
        trl.GKDConfig(output_dir=str(tmp_path), lmbda=1.5)
    with pytest.raises(DataError, match="row 0: every token is trained, so there is no prompt"):
        make(tmp_path, tokenizer, rows=[{"text": "red birds fly over stone walls"}] * 4)
    make(tmp_path, tokenizer, rows=[{"text": "red birds fly over stone walls"}] * 4, lmbda=0.0)


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path, tokenizer, small_path):
    folder = tmp_path / "teacher"
    tiny(tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert make(tmp_path, tokenizer, teacher=str(folder)).teacher.name == str(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = list(content["model"]["vocab"])
    content["model"]["vocab"] = dict(zip(words, [*range(17), *reversed(range(17, len(words)))], strict=True))
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has another tokenizer: token 17 is"):
        make(tmp_path, tokenizer, teacher=str(folder))


def test_the_report_names_the_teacher(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "Distillation")
    lines = trainer.report()
    assert any(line.startswith("teacher: LlamaForCausalLM, ") and line.endswith("MiB), frozen") for line in lines)
    assert not any(line.startswith(("rewards:", "reference:")) for line in lines)
    lines = make(tmp_path, tokenizer, "GKD", seq_kd=True, lmbda=0.25).report()
    [line] = [line for line in lines if line.startswith("answers: ")]
    assert line.startswith("answers: by the student in 25% of the steps, by the teacher in the others; sampled at ")
    assert line.endswith("temperature 0.9, at most 8 tokens")


def test_a_teacher_on_padded_rows_has_its_student_follow(tmp_path, tokenizer):
    expected, line = run(tmp_path, tokenizer, lmbda=0.0)
    import trl.engine.probe as probe

    original, calls = probe._first_failure, []

    def second(model, base):
        calls.append(base)
        return "the test says so" if len(calls) == 2 else original(model, base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_first_failure", second)
        trainer = make(tmp_path, tokenizer, lmbda=0.0)
    assert "engine: padded rows, because the teacher takes no flat rows: the test says so" in trainer.report()
    ours = first_gradient(trainer)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_a_teacher_in_four_bits_or_with_a_device_map(tmp_path, tokenizer):
    """It is loaded by its name; its gradient is near that of the whole teacher."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "teacher"
    tiny(tokenizer, seed=1, hidden_size=64, head_dim=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    expected, line = run(tmp_path, tokenizer, teacher=str(folder), lmbda=0.0)
    mapped, again = run(
        tmp_path, tokenizer, teacher=str(folder), lmbda=0.0, teacher_model_init_kwargs={"device_map": {"": "cpu"}}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(mapped[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert again["loss"] == pytest.approx(line["loss"], rel=1e-6)
    trainer = make(
        tmp_path, tokenizer, teacher=str(folder), lmbda=0.5, seq_kd=True, canned=False,
        teacher_model_init_kwargs={"load_in_4bit": True}, max_steps=3,
    )  # fmt: skip
    assert trainer.teacher_model.is_loaded_in_4bit
    quantised = first_gradient(trainer)
    assert all(np.isfinite(each["loss"]) for each in trainer.state.log_history if "loss" in each)
    assert all(torch.isfinite(gradient).all() for gradient in quantised.values())
