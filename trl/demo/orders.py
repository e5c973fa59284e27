"""Orders in natural language, and the tickets they should become."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"small": "S", "medium": "M", "large": "L"}
ITEMS = {
    "pizza": "pizzas",
    "burger": "burgers",
    "salad": "salads",
    "soup": "soups",
    "wrap": "wraps",
    "taco": "tacos",
    "sandwich": "sandwiches",
    "curry": "curries",
}
EXTRAS = (None, "olives", "cheese", "onions", "mushrooms", "peppers", "bacon", "chili", "garlic")
CUSTOMERS = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria"),
    *("Noah", "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor"),
)
NEW_CUSTOMERS = ("Alice", "Carlos", "Diana", "George", "Julia", "Martin", "Nina", "Oscar")
PHRASES = (
    "Could I get {order} for {customer}?",
    "Hi, {customer} here. I'd like {order}, please.",
    "{customer} wants {order}.",
    "Please put down {order} for {customer}.",
    "This is {customer}. Can you make me {order}?",
    "We need {order}, and it goes to {customer}.",
    "For {customer}: {order}. Thanks!",
    "Hello! Send {order} to {customer}, please.",
    "{customer} is hungry and asks for {order}.",
    "Let me have {order}. The name is {customer}.",
)
INSTRUCTION = "Write a ticket."
CHANGES = ("No, make that {new}.", "Sorry, I meant {new}.", "Actually, {new}, please.", "Oh wait, rather {new}.")


def right_parts(completions: Sequence[Any], ticket: Sequence[str], **_: Any) -> list[float]:
    """A reward function: the share of right parts among those a ticket has or should have; 0 for other texts."""
    rewards = []
    for completion, right in zip(completions, map(json.loads, ticket), strict=True):
        try:
            written = json.loads(completion[-1]["content"])
        except ValueError:
            written = None
        if not isinstance(written, dict):
            rewards.append(0.0)
            continue
        shared = right.keys() & written.keys()
        rewards.append(sum(written[part] == right[part] for part in shared) / len(right.keys() | written.keys()))
    return rewards


def changed_rows(train: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out prompts: an order and a change of one part of it, with the resulting ticket."""
    generator = random.Random(seed)
    values: dict[str, dict[Any, str]] = {
        "count": dict(zip(range(1, len(COUNTS) + 1), COUNTS, strict=True)),
        "size": {letter: word for word, letter in SIZES.items()},
        "extra": {extra: f"with {extra}" for extra in EXTRAS if extra},
    }

    def changed(row: dict[str, Any]) -> dict[str, Any]:
        system, order, answer = row["messages"]
        ticket = json.loads(answer["content"])
        part = generator.choice(list(values))
        new = generator.choice([value for value in values[part] if value != ticket[part]])
        change = generator.choice(CHANGES).format(new=values[part][new])
        return {
            "prompt": [system, {"role": "user", "content": f"{order['content']} {change}"}],
            "ticket": json.dumps(ticket | {part: new}, separators=(",", ":")),
        }

    # Other orders than those of the stages before.
    train_rows, held_out_rows = order_rows(train, held_out, seed + 2)
    return [changed(row) for row in train_rows], [changed(row) for row in held_out_rows]


def pair_rows(train: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out pairs: an order, its ticket, and that ticket with one mistake."""
    generator = random.Random(seed)

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        *prompt, answer = row["messages"]
        wrong = json.loads(answer["content"])
        part = generator.choice(list(wrong))
        others = {
            "item": list(ITEMS),
            "size": list(SIZES.values()),
            "count": range(1, len(COUNTS) + 1),
            "extra": EXTRAS,
            "name": CUSTOMERS,
        }[part]
        wrong[part] = generator.choice([other for other in others if other != wrong[part]])
        rejected = {"role": "assistant", "content": json.dumps(wrong, separators=(",", ":"))}
        return {"prompt": prompt, "chosen": [answer], "rejected": [rejected]}

    # Other orders than those of the first stage.
    train_rows, held_out_rows = order_rows(train, held_out, seed + 1)
    return [pair(row) for row in train_rows], [pair(row) for row in held_out_rows]


def order_rows(train: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and held-out rows: chats of an instruction, an order and its ticket.

    No two rows hold the same order, and the held-out customers appear in no training row.
    """
    generator = random.Random(seed)
    seen: set[tuple[Any, ...]] = set()

    def row(customers: Sequence[str]) -> dict[str, Any]:
        while True:
            order = (
                generator.randrange(len(COUNTS)),
                generator.choice(list(SIZES)),
                generator.choice(list(ITEMS)),
                generator.choice(EXTRAS),
            )
            # Of each order there is one row, whoever it is for: a held-out order is new in every sense.
            if order not in seen:
                break
        seen.add(order)
        count, size, item, extra = order
        customer = generator.choice(customers)
        words = f"{COUNTS[count]} {size} {item if count == 0 else ITEMS[item]}" + (f" with {extra}" if extra else "")
        ticket = {"item": item, "size": SIZES[size], "count": count + 1, "extra": extra, "name": customer}
        return {
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": generator.choice(PHRASES).format(order=words, customer=customer)},
                {"role": "assistant", "content": json.dumps(ticket, separators=(",", ":"))},
            ]
        }

    return [row(CUSTOMERS) for _ in range(train)], [row(NEW_CUSTOMERS) for _ in range(held_out)]
