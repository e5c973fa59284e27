"""Finds the assistant's turns in a rendered conversation: spans of characters, and the tokens inside them.

The spans are worked out from what the template does, not from what it looks like:

1. A template with `{% generation %}` markers marks the turns itself.
2. Otherwise the conversation is rendered a second time with a sentinel before and after each assistant content. If the
   text without sentinels equals the plain rendering, the sentinels mark the contents. A probe, rendered once for each
   template, shows which text of the turn stands before its content and what ends the turn. If the template strips the
   reasoning from a content, and the opening sentinel with it, the turn begins where the rendering of the messages
   before it ends.
3. A template that rewrites more (that writes tool calls, that quotes) loses the sentinels. The turn then ends where a
   rendering with another content begins to agree with this one again.

A turn that none of these finds is an error, never a guess.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trl.data.reading.errors import DataError
from trl.data.tokenizing.chat import ChatTemplate, Messages, chat_template, common_prefix_length

Span = tuple[int, int]  # from the first character to one past the last

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_USE = range(0xE000, 0xF8FF)  # characters that no text should contain: sentinels are taken from here


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, **template_kwargs: Any
) -> tuple[str, list[Span]]:
    """The rendered text of a conversation, and the span of every assistant turn in it.

    A span goes from the end of the generation prompt to the end of turn, which it includes. `template_kwargs` are
    further arguments of the template. Raises `DataError` if a turn cannot be found.
    """
    return AssistantSpans(chat_template(tokenizer)).find(messages, **template_kwargs)


def mask_tokens(offsets: Sequence[Span], spans: Sequence[Span], trimmed: bool = False) -> list[bool]:
    """Which tokens are trained: those that begin inside a span. One bool for each token.

    `offsets` are the characters of each token, as the tokenizer gives them. `trimmed` (False by default) says that
    they leave out the space at the beginning of a token (see `trims_offsets`). A token across the left edge of a span
    is not trained: when the model answers, the prompt ends at that edge, and the token does not occur.
    """
    mask = [False] * len(offsets)
    for start, end in spans:
        first, last = first_token_at(offsets, start, trimmed), first_token_at(offsets, end, trimmed)
        mask[first:last] = [True] * (last - first)
    return mask


def first_token_at(offsets: Sequence[Span], position: int, trimmed: bool = False) -> int:
    """Index of the first token that begins at `position` or later. If there is none: the number of text tokens."""
    # Special tokens that the tokenizer added have no characters. Those at the end break the order of the offsets.
    count = len(offsets)
    while count and tuple(offsets[count - 1]) == (0, 0):
        count -= 1
    first = bisect_left(offsets, (position,), hi=count)
    if trimmed and 0 < first < count and offsets[first - 1][1] < position:
        first += 1  # the space of this token stands before `position`
    return first


def trims_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether offsets leave out the space at the beginning of a token, as those of some byte-level tokenizers do."""
    encoding = tokenizer("a b", add_special_tokens=False, return_offsets_mapping=True)
    last = tokenizer.convert_ids_to_tokens(encoding["input_ids"][-1])
    return last in ("Ġb", "▁b") and encoding["offset_mapping"][-1][0] == 2


class AssistantSpans:
    """Finds the assistant's turns in the texts that a chat template renders."""

    def __init__(self, template: ChatTemplate):
        self.template = template

    def find(self, messages: Messages, **kwargs: Any) -> tuple[str, list[Span]]:
        """The rendered text and the spans of the assistant's turns. Raises `DataError` if a turn cannot be found."""
        marked = self._spans_by_markers(messages, **kwargs)
        if marked is not None:
            return marked
        text = self.template.render(messages, **kwargs)
        sentinels = _unused(text)
        marked_text = self.template.try_render(_mark(messages, *sentinels), **kwargs)
        return text, self._spans(messages, text, marked_text, sentinels, **kwargs)

    def find_all(self, conversations: Sequence[Messages]) -> list[tuple[str, list[Span]] | DataError]:
        """`find` for several conversations. The result of one that fails is its error."""
        if self._has_markers():
            return [self.find_or_error(messages) for messages in conversations]
        try:
            texts = self.template.render_all(conversations)
            sentinels = _unused("".join(texts))
            all_marked = self.template.render_all([_mark(messages, *sentinels) for messages in conversations])
        except DataError:  # one conversation fails; the others may not
            return [self.find_or_error(messages) for messages in conversations]
        results: list[tuple[str, list[Span]] | DataError] = []
        for messages, text, marked in zip(conversations, texts, all_marked, strict=True):
            try:
                results.append((text, self._spans(messages, text, marked, sentinels)))
            except DataError as error:
                results.append(error)
        return results

    def find_or_error(self, messages: Messages, **kwargs: Any) -> tuple[str, list[Span]] | DataError:
        """`find`, with its error returned and not raised: the caller adds the number of the row."""
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
        """The span of a turn whose content is at a known place."""
        raw = messages[index]["content"]
        leading = raw[: len(raw) - len(raw.lstrip())] if raw.strip() else ""
        # Whitespace before the content belongs to it, unless the template trimmed it away.
        for space in (leading, "") if leading else ("",):
            for header, written in self.template.facts(**kwargs).leads:
                if text.endswith(header + written + space, 0, content[0]):
                    return content[0] - len(written + space), self._end_of_turn(text, content[1], **kwargs)
        start = self._start(messages, index, text, content[0], **kwargs)
        if start is None:  # only the content is certain
            start = content[0] - len(leading) if text.endswith(leading, 0, content[0]) else content[0]
        return start, self._end_of_turn(text, content[1], **kwargs)

    def _by_difference(self, messages: Messages, index: int, text: str, other: str, **kwargs: Any) -> Span | None:
        """The span of a turn, from a rendering of the messages before it and one with another content in it."""
        message, before, after = messages[index], list(messages[:index]), list(messages[index + 1 :])
        end: int | None = None
        # The text of a tool call is not known, so it cannot be replaced. It ends where the rendering up to it ends.
        if message.get("tool_calls"):
            end = self._end_by_prefix(messages, index, text, **kwargs)
        limit = end
        if end is None:
            for changed in ({"role": "assistant", "content": other}, {**message, "content": other}):
                altered = self.template.try_render([*before, changed, *after], **kwargs)
                if altered is not None and altered != text and other in altered:
                    limit = common_prefix_length(text, altered)
                    rest = _common_suffix_length(text[limit:], altered[limit:])
                    end = self._end_of_turn(text, len(text) - rest, **kwargs)
                    break
            else:
                end = limit = self._end_by_prefix(messages, index, text, **kwargs)
        if end is None or limit is None:
            return None
        start = self._start(messages, index, text, limit, **kwargs)
        return None if start is None else (start, end)

    def _start(self, messages: Messages, index: int, text: str, limit: int, **kwargs: Any) -> int | None:
        """Where the generation prompt of turn `index` ends. `limit` is a position inside the turn."""
        before = messages[:index]
        prompt = self.template.try_render(before, add_generation_prompt=True, **kwargs)
        if prompt is not None:
            common = common_prefix_length(prompt, text)
            if common == len(prompt):
                return min(common, limit)
            # The generation prompt may contain more than the turn does, such as an opened think block. They then
            # agree up to a place inside it. If they differ before, the template rewrites earlier turns.
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
        """One past the end of turn after a content that ends at `position`; `position` if there is no end of turn."""
        if self._ends(text, position, **kwargs):
            return _past_space(text, position) + len(self.template.facts(**kwargs).end)
        match = self.template.special_after_space.match(text, position)
        return match.end() if match else position

    def _ends(self, text: str, position: int, **kwargs: Any) -> bool:
        """Whether the template's end of turn follows at `position`."""
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
        except Exception:  # `render` raises the error, or another way finds the spans
            return None
        text, spans = texts[0], []
        for start, end in indices[0]:
            if not text[start:end].rstrip().endswith(self.template.special_tokens):
                follows = self.template.special.match(
                    text, end
                )  # markers around the content alone leave out its end of turn
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
    """`messages` with sentinels around each assistant content, inside its outer whitespace, which `trim` removes."""
    marked = []
    for message in messages:
        content = message.get("content")
        # A tool call stands between the content and the end of turn, so sentinels cannot mark the turn.
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

    A template that strips the reasoning from a content strips the opening sentinel too. The beginning is None then.
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


def _common_suffix_length(one: str, other: str) -> int:
    return common_prefix_length(one[::-1], other[::-1])
