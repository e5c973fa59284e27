"""The shapes of rows that are understood: a table of readings, with the columns that each needs."""

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a row: the names that its column may have (`()`: any name), and the contents that it may hold."""

    name: str
    columns: tuple[str, ...]
    contents: tuple[str, ...]
    optional: bool = False


class Reading(NamedTuple):
    """One way of reading a row. `says` describes it, with the names of its parts in braces."""

    kind: str
    says: str
    parts: tuple[Part, ...]


NAMED = "\0named"  # stands for the column that the user named with `dataset_text_field`
TEXT = "\0text"  # the same, also if the name is the default
_SYSTEM = Part("system", ("system", "system_prompt"), ("text",), optional=True)

_TOOLS = (
    Part("tools", ("tools",), ("text", "structs", "other"), optional=True),
    Part("chat_template_kwargs", ("chat_template_kwargs",), ("struct", "other"), optional=True),
)

_MASK = ("integers", "booleans", "empty")
MESSAGE_CONTENTS = ("messages", "from_value")
COMPLETION_CONTENTS = (*MESSAGE_CONTENTS, "turn")  # a completion that is one message or several


def _conversations(*names: str) -> Reading:
    return Reading(
        "messages", "conversations in {messages}", (Part("messages", names, MESSAGE_CONTENTS), _SYSTEM, *_TOOLS)
    )


def _dialogue(says: str, prompt: Sequence[str], further: Sequence[str], completion: Sequence[str]) -> Reading:
    """Two strings, a question (maybe with an input) and its answer."""
    parts = [Part("prompt", tuple(prompt), ("text",)), Part("completion", tuple(completion), ("text", "texts"))]
    if further:
        parts.insert(1, Part("input", tuple(further), ("text",), optional=True))
    return Reading("dialogue", says, (*parts, _SYSTEM))


# The first reading whose columns are all present is taken. To add a shape, add an entry here, and to `sequences` a
# function that turns its rows into text.
READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {input_ids}",
        (
            Part("input_ids", ("input_ids",), ("integers",)),
            Part("labels", ("labels",), _MASK, optional=True),
            Part("completion_mask", ("completion_mask",), _MASK, optional=True),
            Part("assistant_masks", ("assistant_masks",), _MASK, optional=True),
            Part("loss_mask", ("loss_mask",), _MASK, optional=True),
        ),
    ),
    Reading("text", "plain text in {text}", (Part("text", (NAMED,), ("text",)),)),
    _conversations(NAMED),
    Reading(
        "prompt_completion",
        "prompts in {prompt} and completions in {completion}",
        (
            Part("prompt", ("prompt",), ("text", "messages")),
            Part("completion", ("completion",), ("text", "messages")),
            *_TOOLS,
        ),
    ),
    _conversations("messages"),
    _conversations("conversations"),
    Reading("text", "plain text in {text}", (Part("text", (TEXT,), ("text",)),)),
    _conversations(),
    _dialogue(
        "instructions in {prompt} and responses in {completion}",
        ("instruction",),
        ("input", "context"),
        ("output", "response", "answer"),
    ),
    _dialogue(
        "questions in {prompt} and answers in {completion}",
        ("question", "query"),
        ("context",),
        ("answer", "answers", "response", "output"),
    ),
    _dialogue(
        "prompts in {prompt} and replies in {completion}",
        ("prompt", "input"),
        (),
        ("response", "output", "answer", "answers"),
    ),
)


def _number(*names: str) -> Part:
    return Part(names[0], names, ("number", "empty"), optional=True)


def _tokens(*names: str, optional: bool = False) -> Part:
    return Part(names[0], names, ("integers", "empty"), optional)


_REFERENCES = (
    _number("ref_chosen_logps", "reference_chosen_logps"),
    _number("ref_rejected_logps", "reference_rejected_logps"),
)

_JUDGED = (_number("margin"), *_REFERENCES)
_LABEL = Part("label", ("label", "kto_tag"), ("number", "empty", "text"))
_ASKED = ("question", "query", "instruction", "input")
_FURTHER = Part("input", ("input", "context"), ("text",), optional=True)


def _two(contents: tuple[str, ...]) -> tuple[Part, Part]:
    """The preferred completion and the rejected one."""
    return (
        Part("chosen", ("chosen", "chosen_response", "chosen_messages"), contents),
        Part("rejected", ("rejected", "rejected_response", "rejected_messages"), contents),
    )


def _pairs(says: str, names: tuple[str, ...], prompt: tuple[str, ...], completion: tuple[str, ...]) -> Reading:
    says = f"{says} in {{prompt}}, chosen completions in {{chosen}}, rejected ones in {{rejected}}"
    extras = (_SYSTEM, *_TOOLS) if prompt != ("text",) or completion != ("text",) else ()
    return Reading("pairs", says, (Part("prompt", names, prompt), *_two(completion), *extras, *_JUDGED))


# Rows with two completions, one of them preferred. `samples` reads them.
PAIR_READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids, chosen in {chosen_ids}, rejected in {rejected_ids}",
        (
            _tokens("prompt_ids", optional=True),
            _tokens("chosen_ids", "chosen_input_ids"),
            _tokens("rejected_ids", "rejected_input_ids"),
            _number("row"),
            *_JUDGED,
        ),
    ),
    _pairs("prompts", ("prompt",), ("text",), ("text",)),
    _pairs("prompts", ("prompt",), ("text", "turn", *MESSAGE_CONTENTS), ("text", *COMPLETION_CONTENTS)),
    _pairs("conversations", ("conversations", "messages"), MESSAGE_CONTENTS, ("text", *COMPLETION_CONTENTS)),
    _pairs("questions", _ASKED, ("text",), COMPLETION_CONTENTS),
    Reading(
        "dialogue",
        "questions in {prompt}, chosen completions in {chosen}, rejected ones in {rejected}",
        (Part("prompt", _ASKED, ("text",)), _FURTHER, *_two(("text",)), _SYSTEM, *_JUDGED),
    ),
    Reading(
        "implicit",
        "chosen conversations in {chosen}, rejected ones in {rejected}; their common beginning is the prompt",
        (*_two(MESSAGE_CONTENTS), _SYSTEM, *_TOOLS, *_JUDGED),
    ),
    Reading(
        "transcripts",
        "chosen transcripts in {chosen}, rejected ones in {rejected}; their common beginning is the prompt",
        (*_two(("transcript",)), _SYSTEM, *_JUDGED),
    ),
    Reading(
        "implicit",
        "chosen texts in {chosen}, rejected ones in {rejected}; their common beginning is the prompt",
        (*_two(("text",)), *_JUDGED),
    ),
    Reading(
        "ranked",
        "prompts in {prompt} and answers in {responses}; the highest of {scores} is chosen, the lowest rejected",
        (
            Part("prompt", ("prompt", *_ASKED), ("text", *MESSAGE_CONTENTS)),
            _FURTHER,
            Part("responses", ("responses", "completions", "answers"), ("texts",)),
            Part("scores", ("scores", "ratings", "rewards"), ("integers", "floats", "empty")),
            _SYSTEM,
        ),
    ),
)


# Rows with one completion and a label that says whether it is wanted; or pairs, each of which makes two rows.
UNPAIRED_READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {completion_ids}, wanted or not by {label}",
        (
            _tokens("prompt_ids"),
            _tokens("completion_ids"),
            _LABEL,
            _number("row"),
            _number("ref_logps"),
            _tokens("kl_completion_ids", optional=True),
            _number("ref_KL_logps"),
        ),
    ),
    Reading(
        "unpaired",
        "prompts in {prompt} and completions in {completion}, wanted or not by {label}",
        (
            Part("prompt", ("prompt",), ("text",)),
            Part("completion", ("completion",), ("text",)),
            _LABEL,
            _number("ref_logps", "reference_logps"),
        ),
    ),
    Reading(
        "unpaired",
        "prompts in {prompt} and completions in {completion}, wanted or not by {label}",
        (
            Part("prompt", ("prompt",), ("text", "turn", *MESSAGE_CONTENTS)),
            Part("completion", ("completion",), ("text", *COMPLETION_CONTENTS)),
            _LABEL,
            _SYSTEM,
            *_TOOLS,
            _number("ref_logps", "reference_logps"),
        ),
    ),
    Reading(
        "implicit",
        "conversations in {completion}, the last turn wanted or not by {label}",
        (
            Part("completion", ("messages", "conversations"), MESSAGE_CONTENTS),
            _LABEL,
            _SYSTEM,
            *_TOOLS,
            _number("ref_logps"),
        ),
    ),
    Reading(
        "dialogue",
        "questions in {prompt} and answers in {completion}, wanted or not by {label}",
        (
            Part("prompt", ("prompt", *_ASKED), ("text",)),
            _FURTHER,
            Part("completion", ("answer", "response", "output"), ("text",)),
            _LABEL,
            _SYSTEM,
            _number("ref_logps"),
        ),
    ),
    *PAIR_READINGS,
)


# Rows with a solution in steps, and a label for each step.
STEP_READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {completion_ids}, whose steps end by {step_mask} and are right or not by {step_labels}",
        (
            _tokens("prompt_ids"),
            _tokens("completion_ids"),
            Part("step_mask", ("step_mask",), _MASK),
            Part("step_labels", ("step_labels",), _MASK),
            _number("row"),
        ),
    ),
    Reading(
        "steps",
        "prompts in {prompt} and steps in {completion}, right or not by {labels}",
        (
            Part("prompt", ("prompt", *_ASKED), ("text", "turn", *MESSAGE_CONTENTS)),
            Part("completion", ("completions", "steps"), ("texts", "empty")),
            Part("labels", ("labels",), (*_MASK, "floats", "texts")),
            _SYSTEM,
            *_TOOLS,
        ),
    ),
)

UNDERSTOOD_PAIRS = (
    "`prompt`, `chosen` and `rejected` (strings, or lists of {role, content} or {from, value}), `chosen` and "
    "`rejected` alone (both with the prompt they share), `question` or `instruction`, `chosen` and `rejected`, "
    "`conversations` with `chosen` and `rejected`, or `prompt`, `responses` and `scores`"
)

UNDERSTOOD_UNPAIRED = (
    "`prompt`, `completion` and `label` (true or false), `messages` and `label`, `question`, `answer` and `label`, or "
    f"pairs: {UNDERSTOOD_PAIRS}"
)

UNDERSTOOD_STEPS = "`prompt`, `completions` (a list of steps) and `labels` (a list of true and false)"

UNDERSTOOD = (
    "`text` (a string), `messages` or `conversations` (a list of {role, content} or {from, value}), `prompt` and "
    "`completion` (strings or such lists), `instruction` and `output`, `question` and `answer`, or `input_ids` (with "
    "`labels` or a mask)"
)
