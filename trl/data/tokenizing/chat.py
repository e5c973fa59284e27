"""Chat templates: conversations to text, and the text that a template writes around an assistant's turn."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from trl.data.reading.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# The fields in which templates read the reasoning of an assistant's message.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
KNOWN_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False, **template_kwargs: Any
) -> str:
    """The text of a conversation by the tokenizer's chat template.

    `add_generation_prompt` (False by default) adds the beginning of an assistant's turn. `template_kwargs` are further
    arguments of the template, such as `tools`. Raises `DataError` if there is no template or it refuses the messages.
    """
    return chat_template(tokenizer).render(messages, add_generation_prompt, **template_kwargs)


@lru_cache(maxsize=16)
def _chat_template(tokenizer: PreTrainedTokenizerBase, *state: Any) -> "ChatTemplate":
    return ChatTemplate(tokenizer)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
    """The chat template of a tokenizer, kept for as long as the tokenizer does not change.

    Raises `DataError` if the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "The data are conversations, but the tokenizer has no chat template. Set `tokenizer.chat_template`, or "
            "take the tokenizer of an instruction-tuned model, or give the rows as `text`."
        )
    state = (str(tokenizer.chat_template), len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)
    return _chat_template(tokenizer, *state)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of the tokens that end a text or a turn: EOS, and the end of turn of the chat template."""
    found = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        template = chat_template(tokenizer)
        found |= {tokenizer.convert_tokens_to_ids(name) for name in template.special.findall(template.facts().end)}
    return found - {None}


class Lead(NamedTuple):
    """The text before the content of an assistant's message.

    `header` ends the generation prompt. `written` is what the template adds after it and the model must learn: usually
    nothing, in some templates an empty think block.
    """

    header: str
    written: str


class Facts(NamedTuple):
    """What a probe found of a template: its leads, the longest first, and the string that ends a turn ("": none)."""

    leads: tuple[Lead, ...] = ()
    end: str = ""


class ChatTemplate:
    """The chat template of one tokenizer. `chat_template(tokenizer)` returns it.

    In its methods, `kwargs` are further arguments of the template, such as `tools`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._facts: dict[str, Facts] = {}
        names = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        names = {name for name in names if name.strip()}  # some vocabularies have added tokens of newlines only
        if tokenizer.bos_token != tokenizer.eos_token:
            names.discard(str(tokenizer.bos_token))  # some templates begin a turn with it; none ends one with it
        self.special_tokens = tuple(sorted(names, key=lambda name: (-len(name), name)))
        self.special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        self.special_after_space = re.compile(rf"\s*(?:{self.special.pattern})")

    # -- rendering ----------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, add_generation_prompt: bool = False, **kwargs: Any) -> str:
        """The text of a conversation. Raises `DataError` if the template refuses it."""
        return self.render_all([messages], add_generation_prompt, **kwargs)[0]

    def render_all(
        self, conversations: Sequence[Messages], add_generation_prompt: bool = False, **kwargs: Any
    ) -> list[str]:
        """The texts of several conversations, in half the time that it takes one by one.

        Raises `DataError`, which names the roles of the first conversation, if the template refuses any of them.
        """
        try:
            complete = [[self.complete(message) for message in messages] for messages in conversations]
            return self._apply(complete, add_generation_prompt, **kwargs)
        # A template is a program of someone else's and may raise anything.
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in conversations[0])
            raise DataError(
                f"the chat template refuses the conversation with the roles [{roles}]: {error}. Change the messages to "
                "what it accepts, or set another `tokenizer.chat_template`."
            ) from error

    def _apply(self, conversations: list[list[dict[str, Any]]], prompt: bool, **kwargs: Any) -> list[str]:
        if not kwargs and self._compiled is not None and all(map(_are_plain, conversations)):
            given = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self._special_map}
            return [self._compiled.render(messages=messages, **given) for messages in conversations]
        return self.tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=prompt, **kwargs)

    @cached_property
    def _compiled(self) -> Any:
        """The compiled template. None if the tokenizer has its own way of rendering, or if it does not compile."""
        if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        try:
            return _compile_jinja_template(self.source())
        except Exception:  # `apply_chat_template` will raise the same error
            return None

    @cached_property
    def _special_map(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    def complete(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message in the form that the template reads.

        No field is None. A message of tool calls alone gets an empty content. The content, the arguments of tool calls
        and the name of the field for reasoning are those that the template reads.
        """
        if _is_plain(message):
            return self._as_read(message)
        complete = {key: value for key, value in message.items() if value is not None}
        if complete.get("tool_calls"):
            complete.setdefault("content", "")
            if self._wants_json_arguments:
                complete["tool_calls"] = [_with_json_arguments(call) for call in complete["tool_calls"]]
        for name in THOUGHTS:
            if complete.get(name) and self._thought and name != self._thought:
                complete.setdefault(self._thought, complete.pop(name))
        return self._as_read(complete)

    def _as_read(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content as the template reads it: a string, or a list of blocks."""
        content = message.get("content")
        if message["role"] in self._reads_blocks and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message  # type: ignore[return-value]

    # -- what the template reads --------------------------------------------------------------------------------------

    def _written(self, messages: Messages, **kwargs: Any) -> str:
        """The text of messages as they are, or "" if the template refuses them."""
        try:
            return self._apply([[dict(message) for message in messages]], False, **kwargs)[0]
        except Exception:  # as in `render_all`
            return ""

    @cached_property
    def _reads_blocks(self) -> frozenset[str]:
        """The roles whose content the template reads only as a list of blocks, as templates of vision models do.

        Such a template would write a string as nothing.
        """
        word = "zqcontent"
        blocks = [{"type": "text", "text": word}]
        found: set[str] = set()

        def form(role: str) -> Any:
            return blocks if role in found else word

        for role, before in (("user", ()), ("assistant", ("user",)), ("system", ()), ("tool", ("user", "assistant"))):
            context = [{"role": each, "content": form(each)} for each in before]
            after = [{"role": "user", "content": form("user")}] if role == "system" else []

            def count(content: Any, role: str = role, context: Any = context, after: Any = after) -> int:
                return self._written([*context, {"role": role, "content": content}, *after]).count(word)

            others = len(context) + len(after)
            if count(word) <= others < count(blocks):
                found.add(role)
        return frozenset(found)

    @cached_property
    def _thought(self) -> str | None:
        """The field in which the template reads reasoning, if there is one."""
        return next((name for name in THOUGHTS if self._writes_thought(name)), None)

    def _writes_thought(self, name: str, **kwargs: Any) -> bool:
        asked = self._as_read({"role": "user", "content": "zq"})
        answer = {**self._as_read({"role": "assistant", "content": "zq"}), name: "zqthought"}
        return "zqthought" in self._written([asked, answer], **kwargs)

    @cached_property
    def _writes_calls(self) -> bool:
        function = {"name": "zqname", "arguments": {"zqkey": "zqvalue"}}
        call = {"id": "zqcall000", "type": "function", "function": function}
        asked = self._as_read({"role": "user", "content": "zq"})
        answer = self.complete({"role": "assistant", "content": "", "tool_calls": [call]})
        return any("zqname" in self._written([asked, answer], **more) for more in ({}, {"tools": [_TOOL]}))

    def _writes_tools(self, messages: Messages, text: str, **kwargs: Any) -> bool:
        functions = [tool.get("function") or tool for tool in kwargs["tools"]]
        if any(str(function.get("name")) in text for function in functions):
            return True
        return self.try_render(messages, **{**kwargs, "tools": None}) != self.try_render(messages, **kwargs)

    def check_complete(self, messages: Messages, text: str, **kwargs: Any) -> None:
        """Raises `DataError` if the rendered `text` leaves out a part of the messages that the model should see.

        Such a part is a content, a tool call, a tool or the reasoning. An unknown role is an error too.
        """
        position = 0
        for index, message in enumerate(messages):
            role = message["role"]
            if role not in KNOWN_ROLES and not self._names(role):
                near = difflib.get_close_matches(role, sorted(KNOWN_ROLES), n=1)
                meant = f"Did you mean {near[0]!r}? " if near else ""
                raise DataError(
                    f"message {index} has the role {role!r}, which is not known and which the chat template does not "
                    f"name. {meant}Known are {', '.join(sorted(KNOWN_ROLES))}, and those that the template names."
                )
            if message.get("tool_calls") and not self._writes_calls:
                raise self._left_out("tool_calls", index, role)
            for name in THOUGHTS:
                if message.get(name) and not self._thought and role == "assistant":
                    raise self._left_out(name, index, role)
            content = message.get("content")
            if not isinstance(content, str) or not content or content.isspace():
                continue
            content = content.strip()
            place = text.find(content, position)
            if place >= 0:
                position = place + len(content)
            # A template may strip the reasoning, write the content as JSON, or write it in another place.
            elif text.find(content[-32:], position) < 0 and not self._writes_content(messages, index, **kwargs):
                raise self._left_out("content", index, role)
        if kwargs.get("tools") and not self._writes_tools(messages, text, **kwargs):
            raise DataError(
                "the chat template leaves out the row's tools, so that the model would never see them. Set a "
                "`tokenizer.chat_template` that writes them, or remove the column."
            )

    def _names(self, role: str) -> bool:
        return re.search(rf"""['"]{re.escape(role)}['"]""", str(self.tokenizer.chat_template)) is not None

    def _writes_content(self, messages: Messages, index: int, **kwargs: Any) -> bool:
        changed = [*messages[:index], {**messages[index], "content": "zqcontent"}, *messages[index + 1 :]]
        text = self.try_render(changed, **kwargs)
        return text is None or "zqcontent" in text

    @staticmethod
    def _left_out(field: str, index: int, role: str) -> DataError:
        return DataError(
            f"the chat template leaves out `{field}` of message {index} ({role}), so that the model would never see "
            f"it. Set a `tokenizer.chat_template` that writes it, write it into the content of a message that the "
            "template writes, or remove it."
        )

    @cached_property
    def _wants_json_arguments(self) -> bool:
        """Whether the arguments of a tool call must be JSON in a string, because the template does not write JSON."""

        def written(arguments: Any) -> str:
            call = {"id": "zqcall000", "type": "function", "function": {"name": "zqname", "arguments": arguments}}
            asked = self._as_read({"role": "user", "content": "zq"})
            called = self._as_read({"role": "assistant", "content": "", "tool_calls": [call]})
            return self._written([asked, called])

        of_dict, of_text = written({"zqkey": "zqvalue"}), written('{"zqkey": "zqvalue"}')
        return ("zqkey" not in of_dict or "'zqkey'" in of_dict) and '"zqkey"' in of_text

    def try_render(self, messages: Messages, add_generation_prompt: bool = False, **kwargs: Any) -> str | None:
        """`render`, or None if the template refuses, as some do for a part of a conversation."""
        if not messages:
            return None
        try:
            return self.render(messages, add_generation_prompt, **kwargs)
        except DataError:
            return None

    def without_tail(self, text: str, **kwargs: Any) -> str:
        """A rendered text that ends with a turn, without what the template writes after the end of that turn."""
        end = self.facts(**kwargs).end
        place = text.rfind(end) + len(end) if end and end in text else -1
        if place >= 0 and not self.special.sub("", text[place:]).strip():
            return text[:place]
        return text.rstrip()  # the turn has another end, or none

    def source(self, **kwargs: Any) -> str:
        """The text of the template itself. Some tokenizers have another one for tools."""
        return self.tokenizer.get_chat_template(None, kwargs.get("tools"))

    # -- the probe ----------------------------------------------------------------------------------------------------

    def facts(self, **kwargs: Any) -> Facts:
        """What the template writes around an assistant turn. Tools and documents do not change that."""
        options = {key: value for key, value in kwargs.items() if key not in ("tools", "documents")}
        key = repr(sorted(options.items()))
        if key not in self._facts:
            self._facts[key] = self._probe(**options)
        return self._facts[key]

    def _probe(self, **kwargs: Any) -> Facts:
        system, questions, answers = "zqsystem", ("zqfirst asked", "zqnext asked"), ("zqfirst said", "zqnext said")
        dialogue = [
            {"role": role, "content": content}
            for question, answer in zip(questions, answers, strict=True)
            for role, content in (("user", question), ("assistant", answer))
        ]
        for probe in (dialogue, [{"role": "system", "content": system}, *dialogue]):
            text = self.try_render(probe, **kwargs)
            if text is None or any(text.count(content) != 1 for content in (*questions, *answers)):
                continue
            leads = []
            for question, answer in zip(questions, answers, strict=True):
                before = probe[: [message["content"] for message in probe].index(answer)]
                lead = self._lead(text, before, question, text.index(answer), **kwargs)
                if lead is not None and lead not in leads:
                    leads.append(lead)
            leads.sort(key=lambda lead: -len(lead.header + lead.written))
            # The end of turn follows both an answer in the middle and the last one.
            middle = text[text.index(answers[0]) + len(answers[0]) : text.index(questions[1])]
            last = text[text.index(answers[1]) + len(answers[1]) :]
            common = middle[: common_prefix_length(middle, last)]
            specials = list(self.special.finditer(common))
            return Facts(tuple(leads), common[: specials[-1].end()].lstrip() if specials else "")
        return Facts()

    def _lead(self, text: str, before: Messages, question: str, answer: int, **kwargs: Any) -> Lead | None:
        prompt, plain = self.try_render(before, add_generation_prompt=True, **kwargs), self.try_render(before, **kwargs)
        if prompt is None or plain is None:
            return None
        asked = text.index(question) + len(question)
        end = min(common_prefix_length(prompt, text), answer)
        begin = len(plain) if prompt.startswith(plain) and asked <= len(plain) < end else asked
        return Lead(text[begin:end], text[end:answer]) if begin < end else None


_TOOL = {
    "type": "function",
    "function": {
        "name": "zqtool",
        "description": "zqdescription",
        "parameters": {"type": "object", "properties": {"zqkey": {"type": "string", "description": "zq"}}},
    },
}


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message is a role and a content, both strings, and nothing else: it needs no conversion."""
    return (
        type(message) is dict and len(message) == 2 and type(message.get("role")) is type(message.get("content")) is str
    )


def _are_plain(messages: Messages) -> bool:
    return all(map(_is_plain, messages)) and bool(messages)


def _with_json_arguments(call: Any) -> Any:
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), Mapping):
        return call
    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix of two texts or lists. Slices compare much faster than single items."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
