"""Rows that are judged: a prompt and its completions, as texts or as lists of messages."""

import os.path
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape
from trl.data.reading.messages import FLAGS, dialogue_of, headed_text, messages_of, place, text_of, with_system

NO_PROMPT, EMPTY, IDENTICAL, PARTED, NO_CHOICE = range(1, 6)  # why a row cannot be used; `comparison_encoder` has more
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
SHOWN = 40  # an error message shows this many characters of a text

Messages = list[dict[str, Any]]


class Sample(NamedTuple):
    """A prompt and its completions, all of them texts or all of them lists of messages.

    In rows of steps, `completions` are the steps. `labels` says which completions are wanted, or which steps are right.
    `dropped` is `KEPT`, or the reason not to use the row; the completions may then be missing.
    """

    prompt: Any
    completions: tuple[Any, ...]
    labels: tuple[bool, ...]
    dropped: int = KEPT


def read(shape: Shape, values: Mapping[str, Any], row: int) -> Sample:
    """The judged sample in a row. `values` holds the parts of the row.

    Raises `DataError`, which names the row and the field, if it cannot be read.
    """
    wheres = {part: place(row, column) for part, column in shape.columns.items()}
    sample = _READERS[shape.kind](shape, values, wheres)
    return _without_flags(sample, wheres) if shape.conversational else sample


def _without_flags(sample: Sample, wheres: Mapping[str, str]) -> Sample:
    """The sample without the flags of its messages. All of a completion is trained on, and nothing of a prompt.

    Raises `DataError` for an assistant's message in a completion whose flag is false.
    """
    for messages in (sample.prompt, *sample.completions):
        for message in messages if isinstance(messages, list) else ():
            for flag in FLAGS:
                on = message.pop(flag, None)
                if messages is not sample.prompt and on is not None and not on and message["role"] == "assistant":
                    part = next(part for part in ("chosen", "completion", "prompt") if part in wheres)
                    raise DataError(
                        f"{wheres[part]}: an assistant's message of a completion has `{flag}` {on!r}. Completions are "
                        "compared whole: move the messages that are not to be trained on to the prompt, or remove the "
                        "field."
                    )
    return sample


def _completion_parts(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the parts that hold completions."""
    return tuple(part for part in ("chosen", "rejected", "completion") if part in values)


def _labels(values: Mapping[str, Any], wheres: Mapping[str, str]) -> tuple[bool, ...]:
    return (truth_of(values["label"], wheres["label"]),) if "label" in values else (True, False)


def truth_of(value: Any, where: str) -> bool:
    """A label as a bool: true or false, 1 or 0, or their names. Raises `DataError`, which begins with `where`, else."""
    if value in (0, 1) and not isinstance(value, str):
        return bool(value)
    if isinstance(value, str) and value.lower() in _TRUTH:  # the names of class labels
        return _TRUTH[value.lower()]
    what = "None" if value is None else repr(value)
    raise DataError(f"{where} is {what}, not true or false. Make it one of the two (or 1 and 0), or remove the row.")


_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def number_of(value: Any, where: str) -> float:
    """A number. Raises `DataError`, which begins with `where`, for anything else."""
    if isinstance(value, int | float) and value == value:
        return float(value)
    raise DataError(f"{where} is {value!r}, not a number. Fill it in, or remove the column or the row.")


# ---------------------------------------------------------------------------------------------------------------------
# Rows with a prompt


def _explicit(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    parts, labels = _completion_parts(values), _labels(values, wheres)
    if not shape.conversational:
        text = text_of(values["prompt"], wheres["prompt"])
        return Sample(text, tuple(text_of(values[part], wheres[part]) for part in parts), labels)
    prompt = with_system(values.get("system"), _turns_of(values["prompt"], wheres["prompt"], "user"))
    completions = [_turns_of(values[part], wheres[part], "assistant") for part in parts]
    if all(completion[0]["role"] == "assistant" for completion in completions):
        ended = tuple(_ended(each, wheres[part]) for each, part in zip(completions, parts, strict=True))
        return Sample(prompt, ended, labels)
    # The completions may repeat the prompt, with the messages before it.
    asked = _bare(prompt[-1])
    for completion, part in zip(completions, parts, strict=True):
        if asked not in [_bare(message) for message in completion[:-1]]:
            first = completion[0]
            raise DataError(
                f"{wheres[part]} begins with the role {first['role']!r} ({_shown(first.get('content'))}) and does not "
                f"repeat {_field(wheres['prompt'])}. A completion begins with the assistant's message: move the others "
                f"to the prompt, or remove the column {_field(wheres['prompt'])}."
            )
    repeated = _implicit_messages(completions, parts, labels, wheres)
    return repeated._replace(prompt=with_system(values.get("system"), repeated.prompt)) if repeated.prompt else repeated


def _bare(message: Mapping[str, Any]) -> tuple[Any, str]:
    return message["role"], str(message.get("content")).strip()


def _turns_of(value: Any, where: str, role: str) -> Messages:
    """Messages from a list, from one message, or from a text, which becomes a message with this `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of([value] if isinstance(value, Mapping) else value, where)


def _ended(completion: Messages, where: str) -> Messages:
    """The completion. Raises `DataError` if its last message is not the assistant's."""
    if completion[-1]["role"] != "assistant":
        raise DataError(
            f"{where} ends with the role {completion[-1]['role']!r}. A completion ends with the assistant's message: "
            "remove what follows it."
        )
    return completion


def _shown(text: Any) -> str:
    text = str(text)
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def _field(where: str) -> str:
    return where[where.index("`") :]


def _question(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    answers = tuple(text_of(values[part], wheres[part]) for part in _completion_parts(values))
    return _answered(shape, values, wheres, answers, _labels(values, wheres))


def _answered(
    shape: Shape,
    values: Mapping[str, Any],
    wheres: Mapping[str, str],
    answers: tuple[str, ...],
    labels: tuple[bool, ...],
) -> Sample:
    """A question, maybe with an input, and its answers, which are texts."""
    if shape.conversational:
        prompt = values["prompt"]
        if isinstance(prompt, str) or prompt is None:
            asked: Any = dialogue_of(text_of(prompt, wheres["prompt"]), values.get("input"), values.get("system"))
        else:
            asked = with_system(values.get("system"), messages_of(prompt, wheres["prompt"]))
        return Sample(asked, tuple([{"role": "assistant", "content": text}] for text in answers), labels)
    prompt = text_of(values["prompt"], wheres["prompt"])
    return Sample(headed_text(prompt, values.get("input"), values.get("system")), answers, labels)


def _ranked(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    """The answer with the highest score as the chosen one, and that with the lowest as the rejected one."""
    answers, scores = values["responses"], values["scores"]
    for part, found in (("responses", answers), ("scores", scores)):
        if not isinstance(found, list | tuple):
            raise DataError(f"{wheres[part]} is {_kind(found)}, not a list. Fill it in, or remove the row.")
    if len(answers) != len(scores):
        raise DataError(
            f"{wheres['scores']} has {len(scores)} entries, but {_field(wheres['responses'])} has {len(answers)}. Give "
            "one score for each response."
        )
    numbers = [number_of(score, f"{wheres['scores']}[{index}]") for index, score in enumerate(scores)]
    texts = [text_of(answer, f"{wheres['responses']}[{index}]") for index, answer in enumerate(answers)]
    if not numbers or min(numbers) == max(numbers):
        return Sample("", (), (True, False), NO_CHOICE)
    best_and_worst = texts[numbers.index(max(numbers))], texts[numbers.index(min(numbers))]
    return _answered(shape, values, wheres, best_and_worst, (True, False))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# ---------------------------------------------------------------------------------------------------------------------
# Rows without a prompt: the completions are full conversations or texts that begin with it


def _implicit(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    parts, labels = _completion_parts(values), _labels(values, wheres)
    if not shape.conversational:
        texts = [text_of(values[part], wheres[part]) for part in parts]
        return _split_texts(texts, _shared_length(*texts), labels)
    conversations = [with_system(values.get("system"), messages_of(values[part], wheres[part])) for part in parts]
    return _implicit_messages(conversations, parts, labels, wheres)


def _implicit_messages(
    conversations: list[Messages], parts: tuple[str, ...], labels: tuple[bool, ...], wheres: Mapping[str, str]
) -> Sample:
    """The prompt of two conversations is their common beginning; that of one is all before its last assistant turn."""
    if len(conversations) == 1:
        turns = [index for index, message in enumerate(conversations[0]) if message["role"] == "assistant"]
        if not turns or not turns[-1]:
            what = "no assistant's turn to judge" if not turns else "nothing before the assistant's turn: no prompt"
            raise DataError(f"{wheres[parts[0]]} has {what}. Add it, or remove the row with `dataset.filter`.")
        _ended(conversations[0], wheres[parts[0]])
        return Sample(conversations[0][: turns[-1]], (conversations[0][turns[-1] :],), labels)
    shortest = min(map(len, conversations))
    common = next((at for at in range(shortest) if conversations[0][at] != conversations[1][at]), shortest)
    common = min(common, shortest - 1)
    if common == 0:
        first, other = (_shown(each[0].get("content")) for each in conversations)
        differ = f"begin differently ({first}, {other})" if first != other else "have one message each"
        raise DataError(
            f"{wheres[parts[0]]} and {_field(wheres[parts[1]])} {differ}, so they share no prompt. Give it in a column "
            "`prompt`, or remove the row with `dataset.filter`."
        )
    if any(each[common]["role"] != "assistant" for each in conversations):
        return Sample(conversations[0][:common], tuple(each[common:] for each in conversations), labels, PARTED)
    completions = tuple(_ended(each[common:], wheres[part]) for each, part in zip(conversations, parts, strict=True))
    return Sample(conversations[0][:common], completions, labels)


def _shared_length(one: str, other: str) -> int:
    """The length of the common beginning of two texts. A space before a word belongs to the word."""
    if one == other:
        return len(one)
    common = len(os.path.commonprefix([one, other]))
    return common - 1 if common and one[common - 1] == " " else common


def _split_texts(texts: list[str], common: int, labels: tuple[bool, ...]) -> Sample:
    """Two texts whose first `common` characters are the prompt."""
    first, second = texts[0][common:], texts[1][common:]
    return Sample(texts[0][:common], (first, second), labels, IDENTICAL if first == second else KEPT)


def _transcripts(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    parts, labels = _completion_parts(values), _labels(values, wheres)
    texts = [text_of(values[part], wheres[part]) for part in parts]
    if not shape.conversational:
        if texts[0] == texts[1]:
            return _split_texts(texts, len(texts[0]), labels)
        shared = texts[0][: len(os.path.commonprefix(texts))]
        turn = "\n\nAssistant:"
        if turn not in shared:
            return Sample("", (), labels, PARTED)
        return _split_texts(texts, shared.rindex(turn) + len(turn), labels)
    conversations = [
        with_system(values.get("system"), transcript_of(text, wheres[part]))
        for text, part in zip(texts, parts, strict=True)
    ]
    return _implicit_messages(conversations, parts, labels, wheres)


def transcript_of(text: str, where: str) -> Messages:
    """The messages of a conversation in text, each turn after a blank line and `Human:` or `Assistant:`.

    Raises `DataError`, which begins with `where`, for any other text.
    """
    before, *turns = SPEAKER.split(text)
    if before.strip() or not turns:
        raise DataError(
            f"{where} begins with {_shown(before.strip())} and not, as the first row does, with 'Human:' after a blank "
            "line. Write every conversation in the same way, or give lists of messages."
        )
    messages: Messages = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:  # a turn of two paragraphs
            messages[-1]["content"] += f"\n\n{content.strip()}"
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _steps(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    steps, labels = values["completion"], values["labels"]
    for part, found in (("completion", steps), ("labels", labels)):
        if not isinstance(found, list | tuple):
            raise DataError(f"{wheres[part]} is {_kind(found)}, not a list. Fill it in, or remove the row.")
    if len(steps) != len(labels):
        raise DataError(
            f"{wheres['labels']} has {len(labels)} entries, but {_field(wheres['completion'])} has {len(steps)} steps. "
            "Give one label for each step."
        )
    texts = tuple(text_of(step, f"{wheres['completion']}[{index}]") for index, step in enumerate(steps))
    truths = tuple(truth_of(label, f"{wheres['labels']}[{index}]") for index, label in enumerate(labels))
    if shape.conversational:
        turns = _turns_of(values["prompt"], wheres["prompt"], "user")
        return Sample(with_system(values.get("system"), turns), texts, truths)
    return Sample(text_of(values["prompt"], wheres["prompt"]), texts, truths)


_READERS: dict[str, Callable[[Shape, Mapping[str, Any], Mapping[str, str]], Sample]] = {
    "pairs": _explicit,
    "unpaired": _explicit,
    "dialogue": _question,
    "ranked": _ranked,
    "implicit": _implicit,
    "transcripts": _transcripts,
    "steps": _steps,
}
