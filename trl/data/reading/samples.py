"""What is judged in a row: a prompt, and what was said to it, as texts or as lists of messages."""

import os.path
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape
from trl.data.reading.messages import FLAGS, dialogue_of, headed_text, messages_of, place, text_of, with_system

NO_PROMPT, EMPTY, IDENTICAL, PARTED, NO_CHOICE = range(1, 6)  # why a row cannot be used; `preference` has more
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
SHOWN = 40  # characters of a text that an error message shows

Messages = list[dict[str, Any]]


class Sample(NamedTuple):
    """A prompt and its completions, all texts or all messages; of steps, `completions` are the steps.

    `labels` says which of the completions are wanted, or which of the steps are right. `dropped` is a reason not to use
    the row, of which the completions may then be missing.
    """

    prompt: Any
    completions: tuple[Any, ...]
    labels: tuple[bool, ...]
    dropped: int = KEPT


def read(shape: Shape, values: Mapping[str, Any], row: int) -> Sample:
    """The sample in a row, of which `values` holds the parts. Raises `DataError`, which names the row and the field."""
    wheres = {part: place(row, column) for part, column in shape.columns.items()}
    sample = _READERS[shape.kind](shape, values, wheres)
    return _without_flags(sample, wheres) if shape.conversational else sample


def _without_flags(sample: Sample, wheres: Mapping[str, str]) -> Sample:
    """The sample without the marks of messages that are trained on: completions are, and prompts are not."""
    for talk in (sample.prompt, *sample.completions):
        for message in talk if isinstance(talk, list) else ():
            for flag in FLAGS:
                on = message.pop(flag, None)
                if talk is not sample.prompt and on is not None and not on and message["role"] == "assistant":
                    part = next(part for part in ("chosen", "completion", "prompt") if part in wheres)
                    raise DataError(
                        f"{wheres[part]}: an assistant's message of a completion has `{flag}` {on!r}. Completions are "
                        "compared whole: move the messages that are not to be trained on to the prompt, or remove the "
                        "field."
                    )
    return sample


def _said(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that hold completions."""
    return tuple(part for part in ("chosen", "rejected", "completion") if part in values)


def _labels(values: Mapping[str, Any], wheres: Mapping[str, str]) -> tuple[bool, ...]:
    return (truth_of(values["label"], wheres["label"]),) if "label" in values else (True, False)


def truth_of(value: Any, where: str) -> bool:
    """A label: true or false, or 1 or 0. Raises `DataError`, which begins with `where`, for anything else."""
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
# A prompt of its own


def _explicit(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    parts, labels = _said(values), _labels(values, wheres)
    if not shape.conversational:
        text = text_of(values["prompt"], wheres["prompt"])
        return Sample(text, tuple(text_of(values[part], wheres[part]) for part in parts), labels)
    prompt = with_system(values.get("system"), _turns_of(values["prompt"], wheres["prompt"], "user"))
    completions = [_turns_of(values[part], wheres[part], "assistant") for part in parts]
    if all(completion[0]["role"] == "assistant" for completion in completions):
        said = tuple(_ended(each, wheres[part]) for each, part in zip(completions, parts, strict=True))
        return Sample(prompt, said, labels)
    # They may say the prompt once more, and what stood before it.
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
    """Messages, given as a list, as one message, or as the text of one that `role` says."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of([value] if isinstance(value, Mapping) else value, where)


def _ended(completion: Messages, where: str) -> Messages:
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
    said = tuple(text_of(values[part], wheres[part]) for part in _said(values))
    return _asked(shape, values, wheres, said, _labels(values, wheres))


def _asked(
    shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str], said: tuple[str, ...], labels: tuple[bool, ...]
) -> Sample:
    """A question that is one text with maybe more to it, and answers that are texts."""
    if shape.conversational:
        prompt = values["prompt"]
        if isinstance(prompt, str) or prompt is None:
            asked: Any = dialogue_of(text_of(prompt, wheres["prompt"]), values.get("input"), values.get("system"))
        else:
            asked = with_system(values.get("system"), messages_of(prompt, wheres["prompt"]))
        return Sample(asked, tuple([{"role": "assistant", "content": text}] for text in said), labels)
    prompt = text_of(values["prompt"], wheres["prompt"])
    return Sample(headed_text(prompt, values.get("input"), values.get("system")), said, labels)


def _ranked(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    """The best answer against the worst."""
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
    said = texts[numbers.index(max(numbers))], texts[numbers.index(min(numbers))]
    return _asked(shape, values, wheres, said, (True, False))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# ---------------------------------------------------------------------------------------------------------------------
# No prompt of its own: the completions are whole conversations or texts, and begin with it


def _implicit(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    parts, labels = _said(values), _labels(values, wheres)
    if not shape.conversational:
        texts = [text_of(values[part], wheres[part]) for part in parts]
        return _apart(texts, _shared_text(*texts), labels)
    talks = [with_system(values.get("system"), messages_of(values[part], wheres[part])) for part in parts]
    return _implicit_messages(talks, parts, labels, wheres)


def _implicit_messages(
    talks: list[Messages], parts: tuple[str, ...], labels: tuple[bool, ...], wheres: Mapping[str, str]
) -> Sample:
    """The prompt is what two conversations begin with alike; of one, what stands before the assistant's last turn."""
    if len(talks) == 1:
        turns = [index for index, message in enumerate(talks[0]) if message["role"] == "assistant"]
        if not turns or not turns[-1]:
            what = "no assistant's turn to judge" if not turns else "nothing before the assistant's turn: no prompt"
            raise DataError(f"{wheres[parts[0]]} has {what}. Add it, or remove the row with `dataset.filter`.")
        _ended(talks[0], wheres[parts[0]])
        return Sample(talks[0][: turns[-1]], (talks[0][turns[-1] :],), labels)
    shortest = min(map(len, talks))
    common = next((at for at in range(shortest) if talks[0][at] != talks[1][at]), shortest)
    common = min(common, shortest - 1)
    if common == 0:
        first, other = (_shown(talk[0].get("content")) for talk in talks)
        differ = f"begin differently ({first}, {other})" if first != other else "have one message each"
        raise DataError(
            f"{wheres[parts[0]]} and {_field(wheres[parts[1]])} {differ}, so they share no prompt. Give it in a column "
            "`prompt`, or remove the row with `dataset.filter`."
        )
    if any(talk[common]["role"] != "assistant" for talk in talks):
        return Sample(talks[0][:common], tuple(talk[common:] for talk in talks), labels, PARTED)
    said = tuple(_ended(talk[common:], wheres[part]) for talk, part in zip(talks, parts, strict=True))
    return Sample(talks[0][:common], said, labels)


def _shared_text(one: str, other: str) -> int:
    """Where two texts part; the space before a word belongs to it."""
    if one == other:
        return len(one)
    common = len(os.path.commonprefix([one, other]))
    return common - 1 if common and one[common - 1] == " " else common


def _apart(texts: list[str], common: int, labels: tuple[bool, ...]) -> Sample:
    said = tuple(text[common:] for text in texts)
    return Sample(texts[0][:common], said, labels, IDENTICAL if said[0] == said[1] else KEPT)


def _transcripts(shape: Shape, values: Mapping[str, Any], wheres: Mapping[str, str]) -> Sample:
    parts, labels = _said(values), _labels(values, wheres)
    texts = [text_of(values[part], wheres[part]) for part in parts]
    if not shape.conversational:
        if texts[0] == texts[1]:
            return _apart(texts, len(texts[0]), labels)
        shared = texts[0][: len(os.path.commonprefix(texts))]
        turn = "\n\nAssistant:"
        if turn not in shared:
            return Sample("", (), labels, PARTED)
        return _apart(texts, shared.rindex(turn) + len(turn), labels)
    talks = [
        with_system(values.get("system"), transcript_of(text, wheres[part]))
        for text, part in zip(texts, parts, strict=True)
    ]
    return _implicit_messages(talks, parts, labels, wheres)


def transcript_of(text: str, where: str) -> Messages:
    """The messages of a conversation that is written out, each turn after a blank line, `Human:` or `Assistant:`."""
    before, *turns = SPEAKER.split(text)
    if before.strip() or not turns:
        raise DataError(
            f"{where} begins with {_shown(before.strip())} and not, as the first row does, with 'Human:' after a blank "
            "line. Write every conversation in the same way, or give lists of messages."
        )
    messages: Messages = []
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:  # a turn of two paragraphs
            messages[-1]["content"] += f"\n\n{said.strip()}"
        else:
            messages.append({"role": role, "content": said.strip()})
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
