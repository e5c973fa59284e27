"""Functions that convert rows from one shape to another, for users. The trainers do not need them."""

import os.path
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from trl.compat.words import older_words
from trl.data.reading.errors import DataError
from trl.data.tokenizing.chat import common_prefix_length

__all__ = [
    "apply_chat_template",
    "extract_prompt",
    "is_conversational",
    "is_conversational_from_value",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "unpair_preference_dataset",
]

MESSAGE_FIELDS = ("prompt", "chosen", "rejected", "completion", "messages")  # the fields that may hold messages
ROWS = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "completion", "label"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
)


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether the texts of a row are lists of messages {role, content}."""
    return next((_has_messages(example[field], {"role"}) for field in MESSAGE_FIELDS if field in example), False)


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """Whether a row has `conversations` of {from, value}."""
    return _has_messages(example.get("conversations"), {"from", "value"})


def _has_messages(value: Any, keys: set[str]) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and keys <= set(value[0])


@older_words(tokenizer="processing_class")
def apply_chat_template(
    example: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase,
    tools: Sequence[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Renders the messages of a row as text.

    `messages` becomes `text`. A prompt gets the generation prompt. If its last message is the assistant's, it stays
    open instead, so that the assistant continues it. Completions are the text after the prompt.

    Args:
        example: a row of `messages`, or of `prompt`, alone or with `completion` or with `chosen` and `rejected`. Its
            `chat_template_kwargs` reach the template too.
        processing_class: a tokenizer or a processor with a chat template.
        tools: functions or their JSON schemas; None by default.
        template_kwargs: further arguments of the template. They take precedence over those of the row.

    Raises `DataError` for a row with other fields, and for a prompt that ends with another role.
    """
    found = {field for field in (*MESSAGE_FIELDS, "label") if field in example}
    if found not in ROWS:
        raise DataError(
            f"The fields {sorted(example)} make no row that can be rendered: give `messages`, or `prompt`, alone or "
            "with `completion` or with `chosen` and `rejected`."
        )
    options = {"tools": tools or None, **(example.get("chat_template_kwargs") or {}), **template_kwargs}

    def render(messages: Any, **more: Any) -> str:
        return processing_class.apply_chat_template(messages, tokenize=False, **more, **options)

    if "messages" in example:
        return {"text": render(example["messages"])}
    completions = [field for field in ("completion", "chosen", "rejected") if field in example]
    rendered: dict[str, Any] = {}
    if "prompt" in example:
        role = example["prompt"][-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise DataError(
                f"The last message of `prompt` has the role {role!r}: it has to be the user's, a tool's or the "
                "assistant's."
            )
        goes_on = role == "assistant"
        prompt = render(example["prompt"], add_generation_prompt=not goes_on, continue_final_message=goes_on)
        full_texts = {field: render(example["prompt"] + example[field]) for field in completions}
        # The end of a prompt alone may differ from its end before a completion: only the common part is the prompt.
        common = [common_prefix_length(prompt, text) for text in full_texts.values()]
        prompt = prompt[: min(common, default=len(prompt))]
        rendered = {"prompt": prompt, **{field: text[len(prompt) :] for field, text in full_texts.items()}}
    else:
        rendered = {field: render(example[field]) for field in completions}
    if "label" in example:
        rendered["label"] = example["label"]
    return rendered


@older_words(tokenizer="processing_class")
def maybe_apply_chat_template(
    example: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase,
    tools: Sequence[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> Mapping[str, Any]:
    """`apply_chat_template` for a row of messages. Any other row is returned as it is."""
    if not is_conversational(example):
        return example
    return apply_chat_template(example, processing_class, tools, **template_kwargs)


def extract_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """The common beginning of `chosen` and `rejected` as `prompt`, and the rest of both.

    Both are texts, or both are lists of messages. A space before a word belongs to the word. If one begins with all of
    the other, the last character or message of the shorter is not part of the prompt. Raises `DataError` if one is
    empty.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shorter = min(len(chosen), len(rejected))
    if not shorter:
        raise DataError("`chosen` or `rejected` is empty, so they have no beginning in common: remove the row.")
    if isinstance(chosen, str):
        common = len(os.path.commonprefix([chosen, rejected]))
    else:
        common = next((at for at in range(shorter) if chosen[at] != rejected[at]), shorter)
    if common == shorter:
        common -= 1
    elif common and chosen[common - 1] == " ":
        common -= 1
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def maybe_extract_prompt(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """`extract_prompt` for a row of `chosen` and `rejected` without a prompt. Any other row is returned as it is.

    A prompt that is text, beside completions that are messages and contain it, counts as none.
    """
    if "chosen" not in example or "rejected" not in example:
        return example
    if "prompt" in example and is_conversational({"chosen": example["chosen"]}) == is_conversational(
        {"prompt": example["prompt"]}
    ):
        return example
    return extract_prompt(example)


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """Turns of {from, value} to messages {role, content}, and `conversations` to `messages`.

    The row is changed in place. Roles keep their names.
    """
    for field in (*MESSAGE_FIELDS, "conversations"):
        turns = example.get(field)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                for old, new in (("from", "role"), ("value", "content")):
                    if old in turn:
                        turn[new] = turn.pop(old)
    if "conversations" in example:
        example["messages"] = example.pop("conversations")
    return example


def unpair_preference_dataset(dataset: Any, **map_kwargs: Any) -> Any:
    """Makes two rows of each pair: one of the chosen `completion` with `label` True, one of the rejected with False.

    Args:
        dataset: a `datasets.Dataset`, an `IterableDataset`, or a dict of them.
        map_kwargs: arguments of its `map`.

    In each batch of `map` the chosen ones come first. Other columns stay, in both rows.
    """
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    columns = first.column_names or list(next(iter(first)))
    return dataset.map(_unpaired, batched=True, remove_columns=columns, **map_kwargs)


def _unpaired(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    rows = len(batch["chosen"])
    return {
        "completion": batch["chosen"] + batch["rejected"],
        "label": [True] * rows + [False] * rows,
        **{column: values * 2 for column, values in batch.items() if column not in ("chosen", "rejected")},
    }


def maybe_unpair_preference_dataset(
    dataset: datasets.Dataset | datasets.DatasetDict, num_proc: int | None = None, desc: str | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """`unpair_preference_dataset` for a data set with the columns `chosen` and `rejected`. Any other stays as it is."""
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    if not {"chosen", "rejected"} <= set(first.column_names):
        return dataset
    return unpair_preference_dataset(dataset, num_proc=num_proc, desc=desc)
