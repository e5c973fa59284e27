"""Streams, mixes and sets of data sets in the trainers; what a resumed run reads of a stream."""

import json

import datasets
import pytest
from datasets import IterableDataset, IterableDatasetDict
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import chat_rows, sft, tiny, tiny_scorer
from tests.trainer.test_online import PROMPTS, Canned, make
from trl import SFTConfig, SFTTrainer
from trl.data.mixture import DatasetMixtureConfig, Mixture, MixturePart, load_mixture
from trl.data.reading.sources import load


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def watched(trainer):
    """The rows of each batch that the trainer takes."""
    seen, step = [], trainer.training_step

    def look(model, inputs, *args, **kwargs):
        seen.append(inputs["row_S"].tolist())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = look
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_passed_over_twice_resumes_on_the_right_row(tmp_path, tokenizer, accumulation):
    def run(folder, resume=None):
        settings = {"max_steps": 8 // accumulation, "save_strategy": "steps", "save_steps": 4 // accumulation}
        trainer = sft(
            tmp_path / folder,
            tiny(tokenizer),
            tokenizer,
            stream_of(chat_rows(5)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        seen = watched(trainer)
        trainer.train(resume_from_checkpoint=resume)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return [sorted(set(rows)) for rows in seen], losses

    whole, losses = run("whole")
    rest, again = run("rest", str(tmp_path / "whole" / f"checkpoint-{4 // accumulation}"))
    assert whole == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4], [0, 1], [2, 3]]
    assert rest == whole[4:] and again[-len(rest) // accumulation :] == losses[-len(rest) // accumulation :]


def test_streams_among_the_evaluation_sets(tmp_path, tokenizer):
    rows = chat_rows(6)
    sets = {"stream": stream_of(rows[:4]), "list": rows[:4]}
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, IterableDatasetDict({"train": stream_of(rows)}), eval_rows=sets,
                  max_steps=1)  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_stream_loss"] == found["eval_list_loss"]
    assert "is trained in every row" not in "\n".join(trainer.reports["eval list"].lines())


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_a_stream_of_prompts_is_drawn_from_and_resumed(tmp_path, tokenizer, method):
    def run(folder):
        return make(tmp_path / folder, tokenizer, method, rows=stream_of(PROMPTS), max_steps=6, save_strategy="steps",
                    save_steps=3, gradient_accumulation_steps=1, steps_per_generation=2)  # fmt: skip

    def drawn(trainer, resume=None):
        rows, draw = [], trainer.collect

        def look(batch, *args, **kwargs):
            rows.append([row["row"] for row in batch])
            return draw(batch, *args, **kwargs)

        trainer.collect = look
        trainer.train(resume_from_checkpoint=resume)
        return rows

    whole, resumed = run("whole"), run("resumed")
    assert drawn(whole) == [[0, 1], [2, 3], [4]]
    assert drawn(resumed, str(tmp_path / "whole" / "checkpoint-3")) == [[4]]
    ours, theirs = ([line["loss"] for line in each.state.log_history if "loss" in line] for each in (resumed, whole))
    assert ours[-3:] == theirs[-3:]


def test_dynamic_sampling_of_a_stream_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="dynamic_sampling draws further prompts from the whole data set, which a str"):
        make(tmp_path, tokenizer, rows=stream_of(PROMPTS), dynamic_sampling=True)


def test_a_mix_of_prompts_is_drawn_from(tmp_path, tokenizer):
    for name, rows in (("a", PROMPTS[:2]), ("b", PROMPTS[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def reward(wanted, **_):
        seen.extend(wanted)
        return [1.0] * len(wanted)

    mix = load_mixture([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])["train"]
    trainer = make(tmp_path, tokenizer, reward_funcs=reward, rows=mix, max_steps=3)
    trainer.sampler = Canned()
    trainer.train()
    assert set(seen) == {row["wanted"] for row in PROMPTS}


def test_rows_of_mixed_streams_are_drawn_apart(tmp_path, tokenizer, capsys):
    """Equal prompts at equal places of two streams: random numbers are named by the row."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(PROMPTS[0]) + "\n" for _ in range(2)))
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    mix = load_mixture(DatasetMixtureConfig(datasets=files, streaming=True))["train"]
    trainer = make(tmp_path, tokenizer, rows=mix, per_device_train_batch_size=8, max_steps=1)
    drawn = []

    class Watched(Canned):
        def generate(self, requests, sampling):
            drawn.extend(requests)
            return super().generate(requests, sampling)

    trainer.sampler = Watched()
    trainer.train()
    assert [request.seed[-1] for request in drawn] == [0, 1, 10**12, 10**12 + 1]
    assert len({request.seed for request in drawn}) == 4
    assert "train: 4 prompts; a mix of 2 streams" in capsys.readouterr().out  # it is not read a second time


@pytest.mark.parametrize("method", ["GRPO", "OnlineDPO"])
def test_a_missing_column_of_a_mix_is_told_before_the_model_loads(tmp_path, method):
    def reward(wanted, sought, **_):
        return [0.0] * len(wanted)

    def of(*parts):
        streams = [{"rows": load(rows), **more} for rows, more in parts]
        return Mixture([MixturePart(label="part", **part) for part in streams])

    def trainer(**given):
        args = getattr(trl, f"{method}Config")(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        return getattr(trl, f"{method}Trainer")("nowhere", reward_funcs=reward, args=args, **given)

    bare, renamed = (PROMPTS, {}), (PROMPTS, {"columns": {"wanted": "sought"}})
    whole = [{**row, "sought": 1} for row in PROMPTS]
    missing = "reward function 'reward': it requires `sought`, and the data have no such column"
    for given in (
        {"train_dataset": of(bare, bare)},
        {"train_dataset": {"train": load(PROMPTS), "test": load(whole)}},
        {"train_dataset": whole, "eval_dataset": of(bare)},
        {"train_dataset": whole, "eval_dataset": datasets.DatasetDict({"a": load(whole), "b": load(PROMPTS)})},
    ):
        with pytest.raises(ValueError, match=missing):
            trainer(**given)
    # A part that lacks it has None there; a column has its old name and its new one.
    for mix in (of(bare, (whole, {})), of(bare, renamed)):
        with pytest.raises(Exception, match="nowhere"):
            trainer(train_dataset=mix)


class Processor:
    """As a vision model's: a tokenizer, and a template of its own."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_a_processor_stands_for_its_tokenizer(tmp_path, tokenizer, capsys):
    trainer = sft(tmp_path, tiny(tokenizer), Processor(tokenizer), chat_rows(2))
    assert trainer.processing_class is tokenizer
    assert "only the tokenizer of the Processor is used" in capsys.readouterr().out


def test_a_length_beyond_the_window_is_told_before_the_weights_load(tmp_path, tiny_path, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    config = SFTConfig(output_dir=str(tmp_path), max_length=4096, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="max_length=4096 is beyond the model's window of 2,048 tokens: lower"):
        SFTTrainer(tiny_path, config, train_dataset=chat_rows(2))


@pytest.mark.parametrize("method", ["SFT", "DPO", "Reward"])
def test_a_length_beyond_the_window_of_a_model_at_hand(tmp_path, tokenizer, monkeypatch, method):
    trainer = getattr(trl, f"{method}Trainer")
    monkeypatch.setattr(trainer, "rows", lambda *_: pytest.fail("the rows were read"))
    config = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path), max_length=4096, report_to="none", use_cpu=True, bf16=False
    )
    model = tiny_scorer(tokenizer) if method == "Reward" else tiny(tokenizer)
    window = model.config.max_position_embeddings
    said = f"max_length=4096 is beyond the model's window of {window:,} tokens: .*from_pretrained\\(..., max_pos"
    with pytest.raises(ValueError, match=said):
        trainer(model, args=config, processing_class=tokenizer, train_dataset=chat_rows(2))


@pytest.mark.parametrize("columns", ["q=question,a=answer", "q=question a=answer", '{"question": "q", "answer": "a"}'])
def test_columns_as_they_are_typed(tmp_path, tokenizer, columns):
    rows = [{"q": "what is the sum", "a": number} for number in range(2)]
    trainer = SFTTrainer(
        tiny(tokenizer),
        SFTConfig(output_dir=str(tmp_path), columns=columns, report_to="none", use_cpu=True),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    text = tokenizer.decode(trainer.train_dataset[1]["input_ids"])
    assert "<|im_start|>user\nwhat is the sum<|im_end|>\n<|im_start|>assistant\n1<|im_end|>" in text
    with pytest.raises(ValueError, match="columns='q' cannot be read .*: write question=prompt,reply=completion"):
        SFTConfig(output_dir=str(tmp_path), columns="q")
