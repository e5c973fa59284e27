"""The GRPO example: its prompts, its reward function, its picture, and the whole of it in its short form."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from examples import grpo_instructions as example
from examples.grpo_instructions import Point
from tests.examples.helpers import quick
from trl.rewards.named import find

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("The river shines in the light of a lamp.", 1.0),
        ("  A lamp lit the quiet river!\n", 1.0),
        ("River and lamp are two of the words.", 1.0),
        ("The river shines in the light of the moon.", 0.75),
        ("The rivers shine in the light of a lamp.", 0.75),  # another word
        ("A river, a lamp.", 0.75),  # four words
        ("The lamp on the other side of the river shone all night long, brightly.", 0.75),  # fourteen
        ("The river shines in the light of a lamp", 0.75),
        ("the river shines in the light of a lamp.", 0.75),
        ("The river is dark. The lamp is lit.", 0.75),
        ("The river is dark:\nthe lamp is not lit.", 0.75),
        ("river lamp", 0.5),
        ("", 0.0),
    ],
)
def test_the_reward_is_the_share_of_what_was_asked(text: str, reward: float) -> None:
    assert example.follows([text], [["river", "lamp"]]) == [reward]
    assert example.follows([[{"role": "assistant", "content": text}]], [["river", "lamp"]], prompts=None) == [reward]


def test_the_reward_function_is_found_by_the_file() -> None:
    follows = find(f"{ROOT / 'examples' / 'grpo_instructions.py'}:follows")
    assert follows(["A lamp lit the quiet river.", "No."], [["river", "lamp"]] * 2) == [1.0, 0.25]


def test_held_out_prompts_ask_for_new_words() -> None:
    train, held_out = example.rows(300, example.WORDS, 0), example.rows(40, example.NEW_WORDS, 0)
    assert set(example.WORDS).isdisjoint(example.NEW_WORDS)
    assert len(set(example.WORDS)) == len(example.WORDS)
    pairs = [tuple(row["words"]) for row in train + held_out]
    assert len(set(pairs)) == len(pairs) == 340
    for row in train + held_out:
        (message,) = row["prompt"]
        assert all(f"'{word}'" in message["content"] for word in row["words"])
        assert f"{example.LEAST} " in message["content"] and f" {example.MOST} words" in message["content"]
    assert example.rows(300, example.WORDS, 0) == train
    assert example.rows(300, example.WORDS, 1) != train


def test_the_curve_comes_from_the_last_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10):
        log = [
            {"step": 0, "eval_reward": 0.25, "eval_reward_ci95": 0.0625, "eval_pass@1": 0.0},
            {"step": 1, "reward": 0.5, "loss": 0.1},
            {"step": step, "eval_reward": 0.75, "eval_reward_ci95": 0.03125, "eval_pass@1": 0.5},
            {"step": step, "train_runtime": 1.0},
        ]
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    trained, held_out, passed = example.curves(tmp_path)
    assert trained == [Point(1, 0.5)]
    assert held_out == [Point(0, 0.25, 0.0625), Point(10, 0.75, 0.03125)]
    assert passed == 0.5

    example.write_csv(tmp_path / "curve.csv", trained, held_out)
    with (tmp_path / "curve.csv").open(newline="") as stream:
        lines = list(csv.reader(stream))
    assert lines == [
        ["step", "train_reward", "eval_reward", "eval_reward_ci95"],
        ["0", "", "0.25", "0.0625"],
        ["1", "0.5", "", ""],
        ["10", "", "0.75", "0.03125"],
    ]


@pytest.mark.parametrize("steps", [0, 2, 30, 400])
def test_the_picture_stays_in_its_frame(steps: int) -> None:
    held_out = [Point(0, 0.0, 0.0), Point(steps, 1.0, 0.0)]
    picture = ElementTree.fromstring(example.svg([Point(step, 0.5) for step in range(steps)], held_out, "A title"))
    _, _, wide, high = map(float, picture.attrib["viewBox"].split())
    space = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in picture.iter(f"{space}text")]
    assert {"A title", "0.0", "1.0", "mean reward", "optimizer step"} <= set(texts)
    assert sum(text is not None and text.isdigit() for text in texts) <= 12  # ticks do not run into one another
    for line in picture.iter(f"{space}polyline"):
        for place in line.attrib["points"].split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= wide and 0 <= y <= high
    assert len(list(picture.iter(f"{space}circle"))) == 2


def test_a_command_is_printed_as_it_is_run() -> None:
    arguments = example.command("a model", Path("out"), example.FULL, seed=3)
    text = example.typed(arguments)
    assert "'a model'" in text
    assert text.replace(" \\\n        ", " ").split()[:2] == ["trl", "grpo"]
    assert max(map(len, text.splitlines())) < 110
    assert example.FULL.steps % example.FULL.evaluations == 0


@pytest.mark.slow
def test_the_quick_example_runs(smol2_path: str, tmp_path: Path) -> None:
    said = quick("grpo_instructions.py", smol2_path, tmp_path)
    assert "--reward_funcs examples/grpo_instructions.py:follows" in said
    assert f"Mean reward on {example.QUICK.held_out} held-out prompts" in said
    with (tmp_path / "curve.csv").open(newline="") as stream:
        assert [line["step"] for line in csv.DictReader(stream)] == ["0", "1", "2"]
    ElementTree.parse(tmp_path / "curve.svg")
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
