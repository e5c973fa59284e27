"""What a stranger adds: a loss, a reward, a shape of rows, a method with its own config, an environment.

Each is one file, and at most one row in a table; nothing else is edited.
"""

import json
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import DEFAULTS, pair_rows, tiny
from tests.trainer.test_online import PROMPTS, assert_same, first_step, make, reward
from trl.cli.main import main
from trl.data.reading import formats
from trl.data.reading.readings import Part, Reading
from trl.losses.policy import SEQUENCES, PolicyLoss, by_sequence, clip, ratio_bounds
from trl.methods import METHODS, Method
from trl.rollout.types import Completion
from trl.trainer.online_method import kl_of_trace


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Writes a module of the stranger's own, which can be imported."""

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


# --- losses ---------------------------------------------------------------------------------------------------------


def test_a_dpo_loss(tmp_path, tokenizer, stranger):
    stranger(
        "dpo_losses",
        """
        from torch.nn import functional as F

        def log_sigmoid(*, chosen_score_P, rejected_score_P, beta):
            return -F.logsigmoid(beta * (chosen_score_P - rejected_score_P))
        """,
    )

    def losses(loss_type):
        args = trl.DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=3, loss_type=[loss_type])
        trainer = trl.DPOTrainer(tiny(tokenizer), args=args, train_dataset=pair_rows(6), processing_class=tokenizer)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert losses("dpo_losses:log_sigmoid") == pytest.approx(losses("sigmoid"), rel=1e-6)


def test_a_policy_loss(tmp_path, tokenizer, stranger):
    """A function alone is averaged over tokens; a row says how it is added up, and where it clips."""
    stranger(
        "policy_losses",
        """
        from trl.losses.policy import SEQUENCES, PolicyLoss, by_sequence, ratio_bounds

        def clipped(*, ratio_N, advantage_N, epsilon, epsilon_high):
            import torch
            bounded_N = ratio_N.clamp(1 - epsilon, 1 + epsilon_high)
            return -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)

        ROW = PolicyLoss(clipped, by_sequence, SEQUENCES, ratio_bounds)
        """,
    )
    for name, theirs in (("dapo", "policy_losses:clipped"), ("grpo", "policy_losses:ROW")):
        expected, line = first_step(make(tmp_path, tokenizer, loss_type=name))
        ours, other = first_step(make(tmp_path, tokenizer, loss_type=theirs))
        assert_same(ours, expected)
        assert other["loss"] == line["loss"]
        assert ("clip_ratio/low_mean" in other) is theirs.endswith("ROW")
    ours, _ = first_step(make(tmp_path, tokenizer, loss_type=PolicyLoss(clip, by_sequence, SEQUENCES, ratio_bounds)))
    assert_same(ours, expected)
    with pytest.raises(ValueError, match="loss_type='nosuch' is not one of grpo, bnpo"):
        make(tmp_path, tokenizer, loss_type="nosuch")


# --- a reward, a shape of rows ---------------------------------------------------------------------------------------


def test_a_reward(tmp_path, tokenizer, stranger):
    """It is named where others are, may read a column of the data, and is weighed and logged under its own name."""
    stranger(
        "rewards_of_mine",
        """
        def near(completions, length, **rest):
            return [-abs(len(text) - wanted) / 10 for text, wanted in zip(completions, length)]
        """,
    )
    rows = [{**row, "length": 4 * place} for place, row in enumerate(PROMPTS)]
    by_name, line = first_step(make(tmp_path, tokenizer, rows=rows, reward_funcs="rewards_of_mine:near"))
    by_function, other = first_step(
        make(tmp_path, tokenizer, rows=rows, reward_funcs=sys.modules["rewards_of_mine"].near)
    )
    assert_same(by_name, by_function)
    assert line["rewards/near/mean"] == other["reward"] < 0
    with pytest.raises(ValueError, match="length"):
        make(tmp_path, tokenizer, reward_funcs="rewards_of_mine:near")


def test_a_shape_of_rows(tmp_path, tokenizer, monkeypatch):
    """New names of columns are a row of the table; another structure is a function."""
    riddle = Reading(
        "dialogue",
        "riddles in {prompt} and solutions in {completion}",
        (Part("prompt", ("riddle",), ("text",)), Part("completion", ("solution",), ("text",))),
    )
    monkeypatch.setattr(formats, "READINGS", (*formats.READINGS, riddle))
    said = [("who flies at night", "the owl"), ("who swims", "the old fish")]

    def prepared(rows, **options):
        args = trl.SFTConfig(**{**DEFAULTS, "output_dir": str(tmp_path)})
        trainer = trl.SFTTrainer(tiny(tokenizer), args, train_dataset=rows, processing_class=tokenizer, **options)
        return trainer.train_dataset["input_ids"], trainer.reports["train"].sentence

    messages = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in said
    ]
    expected, _ = prepared(messages)
    ids, sentence = prepared([{"riddle": ask, "solution": answer} for ask, answer in said])
    assert ids == expected
    assert "riddles in `riddle` and solutions in `solution`" in sentence
    ids, sentence = prepared(
        [{"turns": list(pair)} for pair in said],
        formatting_func=lambda row: [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), row["turns"], strict=True)
        ],
    )
    assert ids == expected


# --- a method -------------------------------------------------------------------------------------------------------

METHOD = """
from dataclasses import dataclass, field

from trl.config import BaseConfig
from trl.engine.score import score
from trl.losses.tokens import mean_metric, seq_sum
from trl.trainer.dpo import pair_batch
from trl.trainer.preference import ReferenceFreeTrainer
from trl.config import PreferenceFields


@dataclass
class MarginConfig(PreferenceFields, BaseConfig):
    margin: float = field(default=2.0, metadata={"help": "Nats by which the chosen completion should be ahead."})


class MarginTrainer(ReferenceFreeTrainer):
    config_class = MarginConfig
    method = "margin"

    @staticmethod
    def batch(rows, to_batch):
        return pair_batch(rows, to_batch)

    def counts(self, batch):
        return {"pairs": batch["row_S"].shape[0] // 2}

    def loss(self, model, batch, step):
        stats = score(model, batch)
        chosen_P, rejected_P = seq_sum(stats.logp_N, stats.seq_N, stats.sequences).view(-1, 2).unbind(1)
        gap_P = chosen_P - rejected_P
        return {"pairs": (self.args.margin - gap_P).clamp(min=0).sum()}, {"gap": mean_metric(gap_P)}
"""


def test_a_method_with_its_own_config_trains_saves_and_has_its_command(
    tmp_path, tokenizer, stranger, monkeypatch, capsys
):
    stranger("margin_method", METHOD)
    row = Method("Margin", "margin learning", "pairs of a chosen and a rejected completion", "margin_method")
    monkeypatch.setitem(METHODS, "margin", row)
    monkeypatch.chdir(tmp_path)
    tiny(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = "\n".join(json.dumps(row) for row in pair_rows(8))
    (tmp_path / "pairs.jsonl").write_text(rows)
    assert main(["--help"]) == 0 and "margin learning: pairs of a chosen" in capsys.readouterr().out
    status = main(
        "margin --model_name_or_path model --dataset_name pairs.jsonl --output_dir out --max_steps 4 --margin 3.0 "
        "--learning_rate 0.01 --logging_steps 1 --use_cpu --report_to none --disable_tqdm".split()
    )
    assert status == 0
    state = json.loads(next((tmp_path / "out").glob("checkpoint-4/trainer_state.json")).read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained by margin learning" in card and "- margin" in card
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- an environment -------------------------------------------------------------------------------------------------


class Counting:
    """Answers the first turn with two tokens, the second with one, and then ends."""

    answers = ([11, 12], [13])

    def start(self, row):
        self.rows = [*getattr(self, "rows", []), row["row"]]
        return Episode(self.answers)


class Episode:
    def __init__(self, answers):
        self.answers = list(answers)

    def step(self, ids):
        return self.answers.pop(0) if self.answers else None


class Turns:
    """A sampler whose turns are two tokens by the seed; their log-probs are 0."""

    def sync(self, model, version):
        self.version = version

    def generate(self, requests, sampling):
        found = []
        for request in requests:
            group = []
            for number in range(request.first, request.first + request.samples):
                generator = np.random.default_rng([*request.seed, number])
                ids = generator.integers(20, 2000, size=min(2, request.limit or 2)).tolist()
                group.append(Completion(ids, [0.0] * len(ids), request.limit is None or request.limit > 1))
            found.append(group)
        return found


def test_an_environment_answers_and_its_tokens_are_not_trained_on(tmp_path, tokenizer):
    args = trl.GRPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, per_device_train_batch_size=4, num_generations=4,
                          max_completion_length=12, max_steps=1, beta=0.1)  # fmt: skip

    def made(environment=None, **settings):
        for name, value in settings.items():
            setattr(args, name, value)
        return trl.GRPOTrainer(tiny(tokenizer), reward, args, train_dataset=PROMPTS, processing_class=tokenizer,
                               sampler=Turns(), environment=environment)  # fmt: skip

    trainer = made(Counting())
    traces = trainer.collect([trainer.train_dataset[0]], 4, training=True)
    for trace in traces:
        ids, mask = trace.columns["ids"].tolist(), trace.columns["mask"].tolist()
        assert len(ids) == trace.length == 9 and ids[2:4] == [11, 12] and ids[6] == 13
        assert mask == [True, True, False, False, True, True, False, True, True] and trace.trained == 6
        assert trace.version == 0
    batch = trainer.made_of(traces)
    trained = [trace.columns["ids"][trace.columns["mask"]].tolist() for trace in traces]
    assert batch["target_N"].tolist() == [token for tokens in trained for token in tokens]
    assert len(batch["advantage_N"]) == len(batch["ref_logp_N"]) == 24
    assert trainer.counts_of(traces)["tokens"] == 24
    # The reference reads what the environment said: its log-probs are those of the whole trace.
    whole = torch.tensor([[*trainer.train_dataset[0]["prompt_ids"], *traces[0].columns["ids"].tolist()]])
    with torch.no_grad():
        logp_TV = trainer.model(whole).logits[0, :-1].log_softmax(-1)
    expected = logp_TV[-9:].gather(1, whole[0, -9:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(traces[0].columns["ref_logps"]), expected, atol=1e-4, rtol=1e-4)
    gradient, line = first_step(made(Counting()))
    assert line["completions/mean_length"] == 9 and all(torch.isfinite(each).all() for each in gradient.values())


def test_a_trace_is_full_at_the_longest_completion(tmp_path, tokenizer):
    args = trl.GRPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, per_device_train_batch_size=4, num_generations=4,
                          max_completion_length=5, max_steps=1)  # fmt: skip
    trainer = trl.GRPOTrainer(tiny(tokenizer), reward, args, train_dataset=PROMPTS, processing_class=tokenizer,
                              sampler=Turns(), environment=Counting())  # fmt: skip
    for trace in trainer.collect([trainer.train_dataset[0]], 4, training=True):
        # Two tokens, the answer, and one more token, with which the turn was cut.
        assert trace.length == 5 and trace.trained == 3


def test_the_own_sampler_goes_on_after_an_answer(tmp_path, tokenizer):
    """What is sampled after the environment's tokens has the log-probs of a pass over the whole trace."""
    args = trl.GRPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, per_device_train_batch_size=4, num_generations=4,
                          max_completion_length=40, max_steps=2, temperature=0.8,
                          generation_kwargs={"eos_token_id": list(range(0, 2048, 3))})  # fmt: skip
    trainer = trl.GRPOTrainer(tiny(tokenizer), reward, args, train_dataset=PROMPTS, processing_class=tokenizer,
                              environment=Counting())  # fmt: skip
    row = trainer.train_dataset[1]
    for trace in trainer.collect([row], 4, training=True):
        ids, mask = trace.columns["ids"].tolist(), trace.columns["mask"]
        whole = torch.tensor([[*row["prompt_ids"], *ids]])
        with torch.no_grad():
            logp_TV = (trainer.model(whole).logits[0, :-1] / 0.8).log_softmax(-1)
        expected = logp_TV[-len(ids) :].gather(1, whole[0, -len(ids) :, None])[:, 0]
        ours = torch.from_numpy(trace.columns["logps"])
        torch.testing.assert_close(ours[mask], expected[mask], atol=1e-3, rtol=1e-3)
        assert (~mask).sum() == 3 and (ours[~mask] == 0).all()
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_divergence_is_that_of_the_policys_own_tokens():
    columns = {
        "logps": np.array([-1.0, 0.0, -2.0], dtype=np.float32),
        "ref_logps": np.array([-1.5, -9.0, -2.25], dtype=np.float32),
    }
    assert kl_of_trace(columns) == 9.75
    assert kl_of_trace({**columns, "mask": np.array([True, False, True])}) == 0.75
