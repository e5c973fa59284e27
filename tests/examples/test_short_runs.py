"""The examples of PPO, GKD, iterative SFT and Online DPO: their parts by values, and each whole in its short form."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import gkd, grpo_instructions, iterative_sft, online_dpo, ppo_sentiment
from tests.examples.helpers import quick

HEADER = ["step", "train_reward", "eval_reward", "eval_reward_ci95"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "source"])
        for place in range(40):
            writer.writerow(
                [f"Film {place} was a long story of two brothers and a river, which I saw, {place} times", 1, "a"]
            )
    return str(path)


def check_curve(folder: Path, held_out: list[int], trained: list[int], *further: str) -> None:
    with (folder / "curve.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == [*HEADER, *further]
    assert all(line[name] for line in lines if line["train_reward"] for name in further)
    assert [int(line["step"]) for line in lines if line["eval_reward"]] == held_out
    assert [int(line["step"]) for line in lines if line["train_reward"]] == trained
    ElementTree.parse(folder / "curve.svg")


def test_the_mean_has_its_interval() -> None:
    mean, half = ppo_sentiment.mean_and_half([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0 and half == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2)


def test_a_halved_model_keeps_its_ends(tiny_path: str) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_path)
    assert gkd.halved(teacher, None).config.num_hidden_layers == 1
    same = gkd.halved(teacher, 2)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(same(ids).logits, teacher(ids).logits)
    deep = AutoModelForCausalLM.from_config(
        type(teacher.config)(**{**teacher.config.to_dict(), "num_hidden_layers": 7})
    )
    part = gkd.halved(deep, 3)
    for place, source in enumerate((0, 3, 6)):
        torch.testing.assert_close(
            part.model.layers[place].mlp.up_proj.weight, deep.model.layers[source].mlp.up_proj.weight
        )
    part.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert deep.model.layers[0].mlp.up_proj.weight.any()  # a copy


def test_likeness_is_that_of_distributions(tiny_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    first = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    second = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]).log()
    ids = torch.tensor([0, 1])
    found = gkd.likeness([(second, ids), (first, ids)], [(first, ids), (first, ids)])
    # One review of the two: half of its tokens agree, at 0.25 ln 2 nats a token.
    log_2 = torch.tensor(2.0).log().item()
    assert found.agreement[0] == 0.75 and found.divergence[0] == pytest.approx(log_2 / 16)
    assert found.loss[0] == pytest.approx((1.5 * log_2 + log_2) / 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    (line,) = gkd.predictions(model, tokenizer, [{"prompt": "The film", "completion": " was long"}])
    assert tokenizer.decode(line[1]) == " was long" and line[0].shape == (len(line[1]), len(tokenizer))


def test_ppo_runs(tiny_path: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--quick", "--model_name_or_path", tiny_path, "--reviews", reviews, "--output_dir", str(tmp_path)]
    assert ppo_sentiment.main(given) == 0
    assert "Mean reward on 6 held-out reviews" in capsys.readouterr().out
    check_curve(tmp_path, [0, 1, 2], [1, 2], "kl")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_gkd_runs(tiny_path: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--quick", "--model_name_or_path", tiny_path, "--reviews", reviews, "--output_dir", str(tmp_path)]
    assert gkd.main(given) == 0
    assert "On 4 held-out reviews" in capsys.readouterr().out
    check_curve(tmp_path, [0, 1, 2], [])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 1


def test_iterative_sft_runs(tiny_path: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--quick", "--model_name_or_path", tiny_path, "--reviews", reviews, "--output_dir", str(tmp_path)]
    assert iterative_sft.main(given) == 0
    assert "Mean reward on 6 held-out reviews" in capsys.readouterr().out
    check_curve(tmp_path, [0, 1, 2], [1, 2])
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_command_of_online_dpo() -> None:
    size = online_dpo.FULL
    arguments = online_dpo.command("a model", Path("out"), size, seed=3)
    assert grpo_instructions.typed(arguments).replace(" \\\n        ", " ").split()[:2] == ["trl", "online-dpo"]
    # Two completions of each prompt make a batch.
    assert arguments[arguments.index("--per_device_train_batch_size") + 1] == str(size.batch // 2)
    assert size.steps % size.evaluations == 0


@pytest.mark.slow
def test_online_dpo_runs(smol2_path: str, tmp_path: Path) -> None:
    said = quick("online_dpo.py", smol2_path, tmp_path)
    assert f"Mean reward on {online_dpo.QUICK.held_out} held-out prompts" in said
    check_curve(tmp_path, [0, 2], [1, 2])
