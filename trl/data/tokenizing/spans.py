"""Which part of a rendered conversation the assistant wrote: spans of characters, and the tokens inside them.

The spans are worked out from what the template does, not from what it looks like:

1. A template with `{% generation %}` markers says where they are.
2. Otherwise the conversation is rendered a second time with a sentinel on either side of each assistant content. If
   the text without sentinels is the plain rendering, the contents are where the sentinels stand. Where the turn begins
   before its content, and what ends it, is known from a probe that is rendered once per template. Where the template
   takes the thinking off a content, and the opening sentinel with it, the turn begins where the rendering of the
   messages before it ends.
3. A template that rewrites more than that (that writes tool calls, that quotes) loses the sentinels. Then the turn ends
   where a rendering with another content begins to agree with this one again.

What none of these can place is an error, never a guess.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trl.data.reading.errors import DataError
from trl.data.tokenizing.chat import ChatTemplate, Messages, chat_template, common_prefix

Span = tuple[int, int]  # from the first character to one past the last

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_USE = range(0xE000, 0xF8FF)  # characters that no text should contain: sentinels are taken from here


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, **template_kwargs: Any
) -> tuple[str, list[Span]]:
    """The rendered text, and for every assistant turn the characters from the end of the generation prompt to the end
    of turn inclusive. Raises `DataError` where the template does not allow to tell."""
    return AssistantSpans(chat_template(tokenizer)).find(messages, **template_kwargs)


def mask_tokens(offsets: Sequence[Span], spans: Sequence[Span], trimmed: bool = False) -> list[bool]:
    """Which tokens are trained: those that begin inside a span.

    `offsets` are the characters of each token, as the tokenizer gives them; `trimmed` says that they leave out the
    space that a token begins with (see `trims_offsets`). A token that straddles the left edge of a span is not
    trained: the model meets that edge at the end of a prompt, where the token is cut in two.
    """
    mask = [False] * len(offsets)
    for start, end in spans:
        first, last = first_token_at(offsets, start, trimmed), first_token_at(offsets, end, trimmed)
        mask[first:last] = [True] * (last - first)
    return mask


def first_token_at(offsets: Sequence[Span], position: int, trimmed: bool = False) -> int:
    """Index of the first token that begins at `position` or later; the number of text tokens if there is none."""
    # Special tokens that the tokenizer added at either end have no characters; those at the end break the order.
    count = len(offsets)
    while count and tuple(offsets[count - 1]) == (0, 0):
        count -= 1
    first = bisect_left(offsets, (position,), hi=count)
    if trimmed and 0 < first < count and offsets[first - 1][1] < position:
        first += 1  # its space stands before `position`
    return first


def trims_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the offsets of a token leave out the space that it begins with (byte-level tokenizers may do so)."""
    encoding = tokenizer("a b", add_special_tokens=False, return_offsets_mapping=True)
    last = tokenizer.convert_ids_to_tokens(encoding["input_ids"][-1])
    return last in ("Ġb", "▁b") and encoding["offset_mapping"][-1][0] == 2


class AssistantSpans:
    """Finds the assistant's turns in what `template` renders."""

    def __init__(self, template: ChatTemplate):
        self.template = template

    def find(self, messages: Messages, **kwargs: Any) -> tuple[str, list[Span]]:
        marked = self._spans_by_markers(messages, **kwargs)
        if marked is not None:
            return marked
        text = self.template.render(messages, **kwargs)
        sentinels = _unused(text)
        marked_text = self.template.try_render(_mark(messages, *sentinels), **kwargs)
        return text, self._spans(messages, text, marked_text, sentinels, **kwargs)

    def find_all(self, conversations: Sequence[Messages]) -> list[tuple[str, list[Span]] | DataError]:
        """`find` of many conversations, with an error in the place of one that fails."""
        if self._has_markers():
            return [self.find_or_error(messages) for messages in conversations]
        try:
            texts = self.template.render_all(conversations)
            sentinels = _unused("".join(texts))
            all_marked = self.template.render_all([_mark(messages, *sentinels) for messages in conversations])
        except DataError:  # of one row; the others need not suffer
            return [self.find_or_error(messages) for messages in conversations]
        results: list[tuple[str, list[Span]] | DataError] = []
        for messages, text, marked in zip(conversations, texts, all_marked, strict=True):
            try:
                results.append((text, self._spans(messages, text, marked, sentinels)))
            except DataError as error:
                results.append(error)
        return results

    def find_or_error(self, messages: Messages, **kwargs: Any) -> tuple[str, list[Span]] | DataError:
        """`find`, with its error returned: the caller knows the row and raises it again with its number."""
        try:
            return self.find(messages, **kwargs)
        except DataError as error:
            return error

    def _spans(
        self, messages: Messages, text: str, marked: str | None, sentinels: tuple[str, str], **kwargs: Any
    ) -> list[Span]:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        contents = _contents_by_sentinels(text, marked, sentinels, len(turns))
        spans: list[Span] = []
        span: Span | None
        for order, index in enumerate(turns):
            start, end = contents[order] if contents is not None else (None, None)
            if start is not None and end is not None:
                span = self._around(messages, index, text, (start, end), **kwargs)
            elif end is not None and self._ends(text, end, **kwargs):
                start = self._start(messages, index, text, end, **kwargs)
                span = None if start is None else (start, self._end_of_turn(text, end, **kwargs))
            else:
                span = self._by_difference(messages, index, text, sentinels[0], **kwargs)
            if span is None or span[0] > span[1] or (spans and span[0] < spans[-1][1]):
                raise DataError(
                    f"cannot tell where the assistant's turn messages[{index}] stands in the rendered text, because "
                    "the chat template rewrites it or leaves it out. Add `{% generation %}` … `{% endgeneration %}` to "
                    "the template, or train on all tokens with assistant_only_loss=False."
                )
            spans.append(span)
        return spans

    def _around(self, messages: Messages, index: int, text: str, content: Span, **kwargs: Any) -> Span:
        """The turn around a content whose place is known exactly."""
        raw = messages[index]["content"]
        leading = raw[: len(raw) - len(raw.lstrip())] if raw.strip() else ""
        # Whitespace before the content belongs to it, unless the template trimmed it away.
        for space in (leading, "") if leading else ("",):
            for header, written in self.template.facts(**kwargs).leads:
                if text.endswith(header + written + space, 0, content[0]):
                    return content[0] - len(written + space), self._end_of_turn(text, content[1], **kwargs)
        start = self._start(messages, index, text, content[0], **kwargs)
        if start is None:  # the content alone is certain
            start = content[0] - len(leading) if text.endswith(leading, 0, content[0]) else content[0]
        return start, self._end_of_turn(text, content[1], **kwargs)

    def _by_difference(self, messages: Messages, index: int, text: str, other: str, **kwargs: Any) -> Span | None:
        """The turn, from renderings of the messages before it and of the same messages with another content."""
        message, before, after = messages[index], list(messages[:index]), list(messages[index + 1 :])
        end: int | None = None
        # The text of a tool call is not at hand to be replaced, but it ends where the rendering up to it ends.
        if message.get("tool_calls"):
            end = self._end_by_prefix(messages, index, text, **kwargs)
        limit = end
        if end is None:
            for changed in ({"role": "assistant", "content": other}, {**message, "content": other}):
                altered = self.template.try_render([*before, changed, *after], **kwargs)
                if altered is not None and altered != text and other in altered:
                    limit = common_prefix(text, altered)
                    rest = _common_suffix(text[limit:], altered[limit:])
                    end = self._end_of_turn(text, len(text) - rest, **kwargs)
                    break
            else:
                end = limit = self._end_by_prefix(messages, index, text, **kwargs)
        if end is None or limit is None:
            return None
        start = self._start(messages, index, text, limit, **kwargs)
        return None if start is None else (start, end)

    def _start(self, messages: Messages, index: int, text: str, limit: int, **kwargs: Any) -> int | None:
        """Where the generation prompt of turn `index` ends; `limit` is a position inside the turn."""
        before = messages[:index]
        prompt = self.template.try_render(before, add_generation_prompt=True, **kwargs)
        if prompt is not None:
            common = common_prefix(prompt, text)
            if common == len(prompt):
                return min(common, limit)
            # The generation prompt may say more than the turn does (open a think block, say): they agree up to
            # some place in it. If they part before, an earlier turn reads differently once later ones follow.
            plain = self.template.try_render(before, **kwargs)
            if plain is not None and prompt.startswith(plain) and len(plain) < common <= limit:
                return common
        ends = [
            place + len(header)
            for header, _ in self.template.facts(**kwargs).leads
            if (place := text.rfind(header, 0, limit)) >= 0
        ]
        return max(ends, default=None)

    def _end_by_prefix(self, messages: Messages, index: int, text: str, **kwargs: Any) -> int | None:
        whole = self.template.try_render(messages[: index + 1], **kwargs)
        if whole is None or not text.startswith(whole):
            return None
        end = len(whole.rstrip())
        return end if text.endswith(self.template.special_tokens, 0, end) else self._end_of_turn(text, end, **kwargs)

    def _end_of_turn(self, text: str, position: int, **kwargs: Any) -> int:
        """One past the end of turn that follows the content ending at `position`; `position` if none follows."""
        if self._ends(text, position, **kwargs):
            return _past_space(text, position) + len(self.template.facts(**kwargs).end)
        match = self.template.special_after_space.match(text, position)
        return match.end() if match else position

    def _ends(self, text: str, position: int, **kwargs: Any) -> bool:
        """Whether what ends a turn in this template follows at `position`."""
        end = self.template.facts(**kwargs).end
        return bool(end) and text.startswith(end, _past_space(text, position))

    def _has_markers(self, **kwargs: Any) -> bool:
        return GENERATION_MARKER.search(self.template.source(**kwargs)) is not None

    def _spans_by_markers(self, messages: Messages, **kwargs: Any) -> tuple[str, list[Span]] | None:
        if not self._has_markers(**kwargs):
            return None
        try:
            texts, indices = render_jinja_template(
                [[self.template.complete(message) for message in messages]],
                chat_template=self.template.source(**kwargs),
                return_assistant_tokens_mask=True,
                **{**self.template.tokenizer.special_tokens_map, **kwargs},
            )
        except Exception:  # `render` will say what is wrong, or another way will do
            return None
        text, spans = texts[0], []
        for start, end in indices[0]:
            if not text[start:end].rstrip().endswith(self.template.special_tokens):
                follows = self.template.special.match(text, end)  # markers around the content alone leave its end out
                end = follows.end() if follows else end
            if start < end:
                spans.append((start, end))
        asked = any(message["role"] == "assistant" for message in messages)
        return (text, spans) if spans or not asked else None


def _unused(text: str) -> tuple[str, str]:
    """Two characters that `text` does not contain."""
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
    return next(free), next(free)


def _mark(messages: Messages, opening: str, closing: str) -> list[dict[str, Any]]:
    """`messages` with sentinels around each assistant content, inside its outer whitespace so that `trim` trims it."""
    marked = []
    for message in messages:
        content = message.get("content")
        # A tool call stands between the content and the end of the turn: the content does not place it.
        if message["role"] == "assistant" and isinstance(content, str) and not message.get("tool_calls"):
            core = content.strip()
            begin = content.index(core)
            content = f"{content[:begin]}{opening}{core}{closing}{content[begin + len(core) :]}"
            message = {**message, "content": content}
        marked.append(dict(message))
    return marked


def _contents_by_sentinels(
    text: str, marked: str | None, sentinels: tuple[str, str], turns: int
) -> list[tuple[int | None, int]] | None:
    """Where the contents of the assistant's turns begin and end, or None if the sentinels changed the text.

    A template that takes the thinking off the front of a content takes the opening sentinel with it: where the contents
    begin is not known then, and None.
    """
    if marked is None:
        return None
    pieces = re.split(f"([{''.join(sentinels)}])", marked)
    found, pieces = pieces[1::2], pieces[::2]
    if "".join(pieces) != text or found.count(sentinels[1]) != turns:
        return None
    whole = found == [*sentinels] * turns
    contents: list[tuple[int | None, int]] = []
    position, start = 0, None
    for piece, sentinel in zip(pieces, found, strict=False):
        position += len(piece)
        if sentinel == sentinels[0]:
            start = position if whole else None
        else:
            contents.append((start, position))
    return contents


def _past_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _common_suffix(one: str, other: str) -> int:
    return common_prefix(one[::-1], other[::-1])
