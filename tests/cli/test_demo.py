"""`trl demo`: its rows, and the whole of it in its short form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl.demo import stages
from trl.demo.orders import COUNTS, CUSTOMERS, ITEMS, NEW_CUSTOMERS, SIZES, changed_rows, order_rows, pair_rows
from trl.rewards.named import find

from .conftest import Command


def parts(rows: list[dict]) -> list[dict]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows]


def test_held_out_rows_are_new(tmp_path: Path) -> None:
    train, held_out = order_rows(320, 48, seed=0)
    assert (len(train), len(held_out)) == (320, 48)
    names = {ticket["name"] for ticket in parts(train)}
    assert names == set(CUSTOMERS)
    assert names.isdisjoint(ticket["name"] for ticket in parts(held_out))
    orders = [tuple(value for key, value in ticket.items() if key != "name") for ticket in parts(train + held_out)]
    assert len(set(orders)) == len(orders)
    assert order_rows(320, 48, seed=0) == (train, held_out)
    assert order_rows(320, 48, seed=1) != (train, held_out)


def test_a_ticket_says_what_the_order_says() -> None:
    for row in order_rows(100, 0, seed=3)[0]:
        order, ticket = row["messages"][1]["content"], json.loads(row["messages"][2]["content"])
        noun = ticket["item"] if ticket["count"] == 1 else ITEMS[ticket["item"]]
        size = next(word for word, letter in SIZES.items() if letter == ticket["size"])
        assert f"{COUNTS[ticket['count'] - 1]} {size} {noun}" in order
        assert ticket["name"] in order
        assert (f"with {ticket['extra']}" in order) if ticket["extra"] else (" with " not in order)


def test_a_pair_differs_in_one_part_of_the_ticket() -> None:
    for row in pair_rows(100, 0, seed=3)[0]:
        right, wrong = (json.loads(row[side][0]["content"]) for side in ("chosen", "rejected"))
        assert right.keys() == wrong.keys()
        assert sum(right[part] != wrong[part] for part in right) == 1


def test_a_change_replaces_one_part_of_the_ticket() -> None:
    words_of = {
        "count": lambda count: COUNTS[count - 1],
        "size": lambda letter: next(word for word in SIZES if SIZES[word] == letter),
        "extra": lambda extra: f"with {extra}",
    }
    train, held_out = changed_rows(200, 40, seed=3)
    unchanged = [row for part in order_rows(200, 40, seed=5) for row in part]
    seen = set()
    for row, plain in zip(train + held_out, unchanged, strict=True):
        old, new = *parts([plain]), json.loads(row["ticket"])
        assert row["prompt"][0] == plain["messages"][0]
        order, _, change = row["prompt"][1]["content"].partition(f"{plain['messages'][1]['content']} ")
        assert order == ""
        (part,) = [part for part in new if new[part] != old[part]]
        assert words_of[part](new[part]) in change
        seen.add(part)
    assert seen == set(words_of)
    assert {json.loads(row["ticket"])["name"] for row in held_out} <= set(NEW_CUSTOMERS)
    assert changed_rows(200, 40, seed=3) == (train, held_out)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"item":"soup","size":"M","count":5,"extra":null,"name":"Tara"}', 1.0),
        ('{"name": "Tara", "item": "soup", "size": "M", "count": 5, "extra": null}', 1.0),
        ('{"item":"soup","size":"L","count":5,"extra":null,"name":"Tara"}', 0.8),
        ('{"item":"soup","size":"L","count":"5","extra":null,"name":"Tara"}', 0.6),
        ('{"item":"soup","size":"M","count":5,"name":"Tara"}', 0.8),
        ('{"item":"soup","size":"M","count":5,"extra":null,"name":"Tara","drink":"tea"}', 5 / 6),
        ('{"item":"soup","size":"M","count":5,"extras":null,"name":"Tara"}', 4 / 6),
        ("{}", 0.0),
        ('{"item":"soup","size":"M","count":5,"extra":null,"name":"Tara"', 0.0),
        ("[1, 2]", 0.0),
        ("5", 0.0),
        ("Five soups for Tara", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_the_share_of_right_parts(text: str, reward: float) -> None:
    function = find("trl.demo.orders.right_parts")
    ticket = '{"item":"soup","size":"M","count":5,"extra":null,"name":"Tara"}'
    assert function([[{"role": "assistant", "content": text}]], [ticket]) == pytest.approx([reward])


@pytest.mark.slow
def test_the_quick_demo_learns(trl_command: Command, smol_path: str, tmp_path: Path) -> None:
    answer = trl_command("demo", "--quick", "--output_dir", "out", timeout=600, OMP_NUM_THREADS="1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("It learned.") == 3
    assert "reference: a frozen copy of the adapter as it was at the start" in answer.stdout
    assert answer.stdout.count("\n  before  ") == answer.stdout.count("\n  after   ") == 3
    assert f"the same answers to {stages.QUICK.reloaded} orders" in answer.stdout

    assert "trl: rewards: right_parts" in answer.stdout
    assert "mean reward: share of parts right" in answer.stdout

    # The commands it ends its stages with work, here cut to two steps.
    commands = [part.split("\n\n")[0].replace("\\\n", " ").split() for part in answer.stdout.split("    trl ")[1:]]
    assert [command[0] for command in commands] == ["sft", "dpo", "grpo"]
    for command, folder in ((commands[0], "again"), (commands[2], "rewarded_again")):
        again = trl_command(*command, "--max_steps", 2, timeout=600, OMP_NUM_THREADS="1")
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "out" / folder / "adapter_model.safetensors").is_file()
