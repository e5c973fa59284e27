"""Chat templates: what one can do, the ChatML format, and tool calls in what a model wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.compat.words import older_words
from trl.data.tokenizing.chat import chat_template, end_tokens
from trl.data.tokenizing.spans import GENERATION_MARKER, assistant_spans
from trl.models.load import tokenizer_of
from trl.models.vocabulary import grow_embeddings

# --- what a template can do -----------------------------------------------------------------------------------------

_ASKED = {"role": "user", "content": "zqasked"}
_SAID = {"role": "assistant", "content": "zqsaid"}
_CALL = {"id": "zqcall000", "type": "function", "function": {"name": "zqname", "arguments": {"zqkey": "zqvalue"}}}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "tool_call_id": "zqcall000", "name": "zqname", "content": "zqresult"}


def has_generation_markers(chat_template: str | Mapping[str, str]) -> bool:
    """Whether a template marks the assistant's turns with `{% generation %}`; of several, the one named `default`."""
    text = chat_template if isinstance(chat_template, str) else chat_template.get("default", "")
    return GENERATION_MARKER.search(text) is not None


@older_words(tokenizer="processing_class")
def is_chat_template_prefix_preserving(processing_class: Any) -> bool:
    """Whether the template writes earlier messages the same, whatever follows them."""
    template = chat_template(tokenizer_of(processing_class))
    for said, after in ((_SAID, [{**_ASKED, "content": "zqagain"}, _SAID]), (_CALLS, [_RESULT])):
        before = template.try_render([_ASKED, said])
        longer = template.try_render([_ASKED, said, *after])
        if before is not None and longer is not None and not longer.startswith(before):
            return False
    return True


def supports_tool_calling(processing_class: Any) -> bool:
    """Whether the template writes an assistant's tool call, its arguments and the message with the tool's result."""
    text = chat_template(tokenizer_of(processing_class)).try_render([_ASKED, _CALLS, _RESULT]) or ""
    return all(word in text for word in ("zqname", "zqkey", "zqvalue", "zqresult"))


def is_chat_template_stop_token_trained(processing_class: Any, chat_template: str | None = None) -> bool:
    """Whether the template's own markers include the end of an assistant's turn, so that a model learns to stop.

    `chat_template` stands in for the tokenizer's. False for a template without markers.
    """
    tokenizer = tokenizer_of(processing_class)
    if not has_generation_markers(chat_template or tokenizer.chat_template or ""):
        return False
    found = tokenizer.apply_chat_template(
        [_ASKED, _SAID, _ASKED, _SAID],
        chat_template=chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [token for token, one in zip(found["input_ids"], found["assistant_masks"], strict=True) if one]
    text = [token for token in trained if tokenizer.decode([token]).strip()]
    return bool(text) and text[-1] in end_tokens(tokenizer)


# The template's own text as a macro, called for the messages up to each turn. What a call adds to the one before is
# the turn; of an assistant's turn all after the generation prompt is marked.
_MARKED = """\
{{%- macro trl_render(messages, add_generation_prompt) -%}}{source}{{%- endmacro -%}}
{{%- set trl = namespace(done='') -%}}
{{%- for message in messages -%}}
{{%- if message['role'] == 'assistant' -%}}
{{%- set before = trl_render(messages[:loop.index0], true) -%}}
{{%- set whole = trl_render(messages[:loop.index], false) -%}}
{{{{- before[trl.done|length:] -}}}}
{{%- set turn = whole[before|length:] -%}}
{{%- generation -%}}{{{{- turn.rstrip() -}}}}{{%- endgeneration -%}}
{{{{- turn[turn.rstrip()|length:] -}}}}
{{%- set trl.done = whole -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- trl_render(messages, add_generation_prompt)[trl.done|length:] -}}}}"""


def get_training_chat_template(processing_class: Any = None, tokenizer: Any = None) -> str | None:
    """The chat template with `{% generation %}` markers around the assistant's turns; None if it has them already.

    Trainers here need none: `assistant_only_loss=True` finds the turns under any template. It is for
    `apply_chat_template(return_assistant_tokens_mask=True)` in loops of one's own. Raises `ValueError` for a template
    that writes earlier turns in another way once others follow, because such turns cannot be marked.
    """
    target = tokenizer_of(processing_class if processing_class is not None else tokenizer)
    source = target.get_chat_template()
    if has_generation_markers(source):
        return None
    marked = _MARKED.format(source=source)
    conversation = [_ASKED, _SAID, {**_ASKED, "content": "zqagain"}, {**_SAID, "content": "zqmore"}]
    text, spans = assistant_spans(target, conversation)
    own = target.chat_template
    try:
        target.chat_template = marked
        found = assistant_spans(target, conversation) if is_chat_template_prefix_preserving(target) else None
    finally:
        target.chat_template = own
    if found != (text, spans):
        raise ValueError(
            "the chat template writes earlier turns in another way once others follow, so its turns cannot be marked: "
            "leave the template as it is, and train with assistant_only_loss=True, which finds them without markers"
        )
    return marked


# --- tool calls that a model wrote ----------------------------------------------------------------------------------


@older_words(tokenizer="processing_class")
def add_response_schema(processing_class: Any) -> Any:
    """Set the tokenizer's `response_template`, so that `parse_response` finds tool calls, and return what was given.

    The template must write a call as JSON with `name` and `arguments` between two tags, as Qwen's and Hermes' do.
    Raises `ValueError` for others: set `tokenizer.response_template` for them.
    """
    tokenizer = tokenizer_of(processing_class)
    template = chat_template(tokenizer)
    text = template.try_render([_ASKED, _CALLS]) or ""
    call = re.search(r"(<[^<>\s]+>|\[[A-Z_]+\])\s*(\{[^<>]*zqname[^<>]*\})\s*(<[^<>\s]+>|\[/[A-Z_]+\])", text)
    facts = template.facts()
    if call is None or not facts.leads or '"arguments"' not in call[2]:
        raise ValueError(
            "the chat template writes no tool call as JSON between two tags, so that its calls cannot be found in a "
            "text: set `tokenizer.response_template` yourself"
        )
    opening, closing = call[1], call[3]
    end = re.escape(facts.end)
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": facts.leads[0].header,
        "fields": {
            "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
            "tool_calls": {
                "open": opening,
                "close_pattern": rf"{re.escape(closing)}\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": rf"{end}\s*", "content": "text"},
        },
    }
    return processing_class


@older_words(processing_class="tokenizer")
def parse_response(
    tokenizer: Any, ids: Sequence[int], prefix: Sequence[int] | None = None, tools: Any = None
) -> dict[str, Any]:
    """The message in generated `ids`: content, reasoning and tool calls, by the tokenizer's `response_template`.

    `prefix` are the ids before them; None stands for the beginning of an assistant's turn. What cannot be parsed, such
    as a call that is no JSON, stays text.
    """
    try:
        before = tokenizer.response_template["start_anchor"] if prefix is None else tokenizer.decode(prefix)
        message = tokenizer.parse_response(tokenizer.decode(ids), prefix=before, tools=tools)
        if all("name" in call["function"] for call in message.get("tool_calls") or []):
            return message
    except (ValueError, KeyError, TypeError, AttributeError):  # what the text or the response template lacks
        pass
    return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}


# --- formats --------------------------------------------------------------------------------------------------------

SIMPLE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() }}: {{ message.content }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIMPLE_SFT_CHAT_TEMPLATE = "{% for message in messages %} {{ message.content }}{% endfor %}{{ eos_token }}"
SIMPLE_QUERY_CHAT_TEMPLATE = "{% for message in messages %} {{ message.content }}{% endfor %}"


@dataclass
class ChatMlSpecialTokens:
    """The tokens and the template of ChatML."""

    bos_token: str = "<|im_start|>"
    eos_token: str = "<|im_end|>"
    pad_token: str = "<|im_end|>"

    @property
    def system(self) -> str:
        return f"{self.bos_token}system"

    @property
    def user(self) -> str:
        return f"{self.bos_token}user"

    @property
    def assistant(self) -> str:
        return f"{self.bos_token}assistant"

    @property
    def chat_template(self) -> str:
        return (
            f"{{% for message in messages %}}{{{{ '{self.bos_token}' ~ message.role ~ '\\n' ~ message.content ~ "
            f"'{self.eos_token}\\n' }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ '{self.assistant}\\n' }}}}{{% endif %}}"
        )


FORMAT_MAPPING = {"chatml": ChatMlSpecialTokens}


def setup_chat_format(
    model: Any, tokenizer: Any, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Give a model and its tokenizer the ChatML format: its two tokens, its template, and rows for them.

    The beginning of a turn becomes the BOS token, the end of a turn the EOS and the padding token, in the model's
    configuration and generation configuration too. The embeddings have at least a row for each token, and with
    `resize_to_multiple_of` a multiple of it; new rows are the mean of the old ones. Returns the model and the
    tokenizer. Raises `ValueError` if the tokenizer has a chat template.
    """
    if tokenizer.chat_template is not None:
        raise ValueError(
            "the tokenizer has a chat template already: train with it, or set tokenizer.chat_template = None first"
        )
    if format not in FORMAT_MAPPING:
        raise ValueError(f"format={format!r} is unknown: {', '.join(FORMAT_MAPPING)}")
    chat = FORMAT_MAPPING[format]()
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = chat.eos_token, chat.pad_token, chat.bos_token
    tokenizer.add_special_tokens({"additional_special_tokens": [chat.bos_token, chat.eos_token]})
    tokenizer.chat_template = chat.chat_template
    grow_embeddings(model, len(tokenizer), resize_to_multiple_of)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(config, name, getattr(tokenizer, name))
    return model, tokenizer
