"""Texts and conversations to tokens: the steps that all recipes share.

A text is tokenised as a whole, not in parts, so that its tokens are those that the model knows from other texts.
"""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape
from trl.data.reading.messages import place, without_none
from trl.data.tokenizing import chat
from trl.data.tokenizing.spans import AssistantSpans, Span, first_token_at, mask_tokens, trims_offsets
from trl.data.tokenizing.words import Words

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """A text to tokenise.

    `spans` are the characters that are trained; None means all. An `open` text is continued, so it gets no token that
    ends a text.
    """

    text: str
    spans: list[Span] | None = None
    open: bool = False


class Tokens(NamedTuple):
    """A text as tokens, before it is cut.

    `ids` and `mask` (whether a token is trained) have the same length. `bos_doubled` says that the text has a beginning
    of text of its own, so that the tokenizer's is left out. `straddles` says that one token covers both the end of the
    prompt and the beginning of the first span.
    """

    ids: list[int]
    mask: list[bool]
    bos_doubled: bool = False
    straddles: bool = False


def bos_doubled(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> bool:
    """Whether the tokenizer added a beginning of text (BOS) to a text that already has one."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(ids[:2]) == [bos, bos] and text.startswith(str(tokenizer.bos_token))


class Encoder:
    """Base of the functions that `datasets.map` applies to batches. They are pickled, so they hold plain values only.

    A subclass turns a batch into the columns of `features`, or, where these are None, into columns whose types are
    those of their values. The recipe's counters are among them.
    """

    features: datasets.Features | None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, recipe: Any, first_row: int = 0):
        self.tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self.shape = shape
        self.recipe = recipe
        self.first_row = first_row
        self.frame: tuple[list[int], list[int]] | None = None

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        raise NotImplementedError

    # -- conversations to text ----------------------------------------------------------------------------------------

    def _template_options(self, batch: Mapping[str, list[Any]], indices: list[int]) -> list[dict[str, Any]] | None:
        """The keyword arguments of the chat template for each row, or None if no row has any."""
        tools, further = self.shape.columns.get("tools"), self.shape.columns.get("chat_template_kwargs")
        if tools is None and further is None:
            return None
        options = []
        for position, row in enumerate(indices):
            option = dict(without_none(batch[further][position] or {})) if further else {}
            value = batch[tools][position] if tools else None
            in_json = isinstance(value, str)  # a null in JSON is meant; in a table it fills a gap
            if isinstance(value, str) and value.strip():
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{place(row, tools or 'tools')} is not valid JSON ({error.msg}). Correct the row."
                    ) from error
            if value and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
                raise DataError(
                    f"{place(row, tools or 'tools')} is a {type(value).__name__}, not a list of tools. Give a list of "
                    "their JSON schemas, or that as JSON."
                )
            if value:
                option["tools"] = value if in_json else without_none(value)
            options.append(option)
        return options if any(options) else None

    def _render(
        self,
        conversations: list[list[dict[str, Any]]],
        options: list[dict[str, Any]] | None,
        indices: Sequence[int],
        column: str,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        template = chat.chat_template(self.tokenizer)
        texts: list[str | None] = [None] * len(conversations)
        if options is None:
            options = [{}] * len(conversations)
            with contextlib.suppress(DataError):  # after an error one by one, to find the row
                texts = [*template.render_all(conversations, add_generation_prompt)]
        found = []
        for messages, text, row, option in zip(conversations, texts, indices, options, strict=True):
            try:
                text = template.render(messages, add_generation_prompt, **option) if text is None else text
                template.check_complete(messages, text, **option)
            except DataError as error:
                raise DataError(f"{place(row, column)}: {error}") from error
            found.append(text)
        return found

    def _assistant_spans(
        self,
        conversations: list[list[dict[str, Any]]],
        options: list[dict[str, Any]] | None,
        indices: Sequence[int],
        column: str,
    ) -> list[tuple[str, list[Span]]]:
        template = chat.chat_template(self.tokenizer)
        spans = AssistantSpans(template)
        results: list[tuple[str, list[Span]] | DataError]
        if options is None:
            results = spans.find_all(conversations)
        else:
            pairs = zip(conversations, options, strict=True)
            results = [spans.find_or_error(messages, **option) for messages, option in pairs]
        found = []
        for number, (result, row) in enumerate(zip(results, indices, strict=True)):
            if isinstance(result, DataError):
                raise DataError(f"{place(row, column)}: {result}") from result
            try:
                template.check_complete(conversations[number], result[0], **(options[number] if options else {}))
            except DataError as error:
                raise DataError(f"{place(row, column)}: {error}") from error
            found.append(result)
        return found

    # -- text to tokens -----------------------------------------------------------------------------------------------

    def _tokenise(self, texts: list[Text], plain: bool) -> list[Tokens]:
        """The tokens of texts. Only `plain` texts get special tokens and EOS; rendered conversations have their own."""
        if not self.tokenizer.is_fast:
            return [self._tokenise_pieces(text, plain) for text in texts]
        words = Words.of(self.tokenizer)
        if words is None:
            return self._tokenise_batch(texts, plain)
        rows = [self._tokenise_words(words, text, plain) for text in texts]
        if not words.right:
            logger.warning(
                "Word-by-word tokenisation differs from the tokenizer, which is used alone from here on. Please report "
                "the name of this tokenizer. To be certain of earlier rows, prepare the data again in this process."
            )
            return self._tokenise_batch(texts, plain)
        missing = [index for index, row in enumerate(rows) if row is None]
        for index, row in zip(missing, self._tokenise_batch([texts[index] for index in missing], plain), strict=True):
            rows[index] = row
        return rows  # type: ignore[return-value]

    def _tokenise_words(self, words: Words, text: Text, plain: bool) -> Tokens | None:
        straddles = False
        if text.spans is None:
            ids = words.encode(text.text)
            if ids is None:
                return None
            mask = [True] * len(ids)
        else:
            marked = words.encode_spans(text.text, text.spans)
            if marked is None:
                return None
            ids, mask, straddles = marked.ids, marked.mask, marked.straddles and plain
        if plain:
            ids, mask = self._framed(text, ids, mask)
        return self._finish(text, ids, mask, plain, straddles)

    def _tokenise_batch(self, texts: list[Text], plain: bool) -> list[Tokens]:
        if not texts:
            return []
        masked = any(text.spans is not None for text in texts)
        encoded = self.tokenizer(
            [text.text for text in texts],
            add_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=masked,
            verbose=False,
        )
        trimmed = masked and trims_offsets(self.tokenizer)
        rows = []
        for index, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
            straddles = False
            if text.spans is None:
                mask = [True] * len(ids)
            else:
                offsets = encoded["offset_mapping"][index]
                mask = mask_tokens(offsets, text.spans, trimmed)
                if plain:
                    first = first_token_at(offsets, text.spans[0][0], trimmed)
                    straddles = first > 0 and offsets[first - 1][1] > text.spans[0][0]
            if plain and text.open and (after := self._frame()[1]):
                ids, mask = ids[: -len(after)], mask[: -len(after)]
            rows.append(self._finish(text, ids, mask, plain, straddles))
        return rows

    def _tokenise_pieces(self, text: Text, plain: bool) -> Tokens:
        """The tokens of a text whose tokenizer gives no offsets: each span, and each piece between spans, by itself."""
        ids: list[int] = []
        mask: list[bool] = []
        length = len(text.text)
        position = 0
        for start, end in [*([(0, length)] if text.spans is None else text.spans), (length, length)]:
            for trained, piece in ((False, text.text[position:start]), (True, text.text[start:end])):
                new = self._encode(piece, special=False) if piece else []
                ids += new
                mask += [trained] * len(new)
            position = end
        if plain:
            ids, mask = self._framed(text, ids, mask)
        return self._finish(text, ids, mask, plain, False)

    def _framed(self, text: Text, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        before, after = self._frame()
        if text.open:
            after = []
        if not before and not after:
            return ids, mask
        return [*before, *ids, *after], [False] * len(before) + mask + [text.spans is None] * len(after)

    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer adds before and after a text."""
        if self.frame is None:
            bare, framed = self._encode("a", special=False), self._encode("a", special=True)
            before = next(shift for shift in range(len(framed)) if framed[shift : shift + len(bare)] == bare)
            self.frame = framed[:before], framed[before + len(bare) :]
        return self.frame

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _finish(self, text: Text, ids: list[int], mask: list[bool], plain: bool, straddles: bool) -> Tokens:
        eos = self.tokenizer.eos_token_id
        doubled = bos_doubled(self.tokenizer, text.text, ids)
        if doubled:
            ids, mask = ids[1:], mask[1:]
        if plain and not text.open and self.recipe.add_eos and eos is not None:
            if ids and ids[-1] == eos:
                mask[-1] = True  # also if the tokenizer added it, where no span covers it
            else:
                ids, mask = [*ids, eos], [*mask, True]
        return Tokens(ids, mask, doubled, straddles)

    def _check_ids(self, ids: Any, where: str) -> list[int]:
        """The token ids of a row. Raises `DataError`, which begins with `where`, if the tokenizer lacks one of them."""
        if ids is None:
            raise DataError(f"{where} is None. Remove such rows with `dataset.filter`.")
        for index, token in enumerate(ids):
            if token is None or token < 0:
                raise DataError(f"{where}[{index}] is {token}, which is no token id. Correct or remove the row.")
            if token >= self.vocabulary:
                raise DataError(
                    f"{where}[{index}] is {token}, but the tokenizer has {self.vocabulary:,} tokens. Tokenise the data "
                    "with the tokenizer of this model."
                )
        return list(ids)

    def _stops(self) -> set[int]:
        """The ids of the tokens that end a text or a turn."""
        return chat.end_tokens(self.tokenizer)
