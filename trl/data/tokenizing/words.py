"""A table from words to tokens, for tokenizers that cut a text into words first: each word is tokenised only once.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM and similar) cuts a text at the added tokens, cuts the rest into words by a
regular expression, and merges bytes inside each word alone. A language has few words, so a table replaces nearly all of
that work. The tokens of a new word come from the tokenizer.

The table is checked all the time. `Words.of` refuses every pipeline that it does not know. An accepted one must give
the tokenizer's tokens for all pairs of ASCII characters. Any other character must be cut as the tokenizer cuts it,
which is tested before its first use. One text in `CHECK_EVERY` is tokenised both ways. After a failure the tokenizer
itself is used.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import regex  # type: ignore[import-untyped]
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerBase

CHECK_EVERY = 64
LARGEST_TABLE = 1_000_000  # words; a text of random words must not fill the memory
LONGEST_WORD = 64  # characters; longer words hardly repeat

# The default pattern of the ByteLevel step of `tokenizers`.
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
# White space as Unicode defines it. Python's `\s` has four more control characters.
ASCII = {"s": r"\t-\r ", "L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9", "Lt": "", "Lm": "", "Lo": "",
         "M": "", "Mn": "", "Nl": "", "No": ""}  # fmt: skip
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
ITEM = re.compile(r"\\[pP]\{\^?\w+\}|\\.|\[\^?|\]|.", re.DOTALL)


class Marked:
    """The tokens of a text with spans.

    `mask` says which tokens begin inside a span. `straddles` says that one token covers the beginning of the first
    span together with text before it.
    """

    __slots__ = ("ids", "mask", "straddles")

    def __init__(self, ids: list[int], mask: list[bool], straddles: bool):
        self.ids, self.mask, self.straddles = ids, mask, straddles


@lru_cache(maxsize=8)
def _of(tokenizer: PreTrainedTokenizerBase, *state: Any) -> "Words | None":
    try:
        words = Words(tokenizer)
    except _Unknown:
        return None
    return words if words.agrees_on_ascii() else None


class _Unknown(Exception):
    """The tokenizer has a step that is not known here."""


class _Table(dict[str, tuple[int, ...]]):
    """Word -> tokens. The tokens of a missing word come from the tokenizer's model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = iter(range(256, 512))
        self.letters = {byte: chr(byte) if byte in visible else chr(next(others)) for byte in range(256)}

    def __missing__(self, word: str) -> tuple[int, ...]:
        letters = "".join(map(self.letters.__getitem__, word.encode()))
        tokens = tuple(token.id for token in self.model.tokenize(letters))
        if len(word) <= LONGEST_WORD:
            if len(self) >= LARGEST_TABLE:
                self.clear()
            self[word] = tokens
        return tokens


class Words:
    """The table of words of one tokenizer. `Words.of(tokenizer)` returns it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.backend = tokenizer.backend_tokenizer
        if self.backend.encode_special_tokens:
            raise _Unknown
        self.backend.no_truncation()  # as every call of the tokenizer without truncation does
        self.backend.no_padding()
        self.nfc = isinstance(self.backend.normalizer, normalizers.NFC)
        model = self.backend.model
        if not (self.backend.normalizer is None or self.nfc) or not isinstance(model, models.BPE):
            raise _Unknown
        if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
            raise _Unknown
        patterns = _patterns(self.backend.pre_tokenizer)
        self.ascii = [re.compile(_captured(pattern, _translated(pattern, True))) for pattern in patterns]
        self.unicode = [regex.compile(_captured(pattern, _translated(pattern, False))) for pattern in patterns]
        added = self.backend.get_added_tokens_decoder()
        if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
            raise _Unknown
        self.added = {token.content: number for number, token in added.items()}
        longest_first = sorted(filter(None, self.added), key=lambda content: (-len(content), content))
        self.cuts = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self.table = _Table(model)
        self.trusted: dict[str, bool] = {}
        self.texts = 0
        self.right = True

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> "Words | None":
        """The table of a tokenizer, or None if there cannot be one. It adds no special tokens around a text."""
        if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
            return None
        words = _of(tokenizer, len(tokenizer), id(tokenizer.backend_tokenizer))
        return words if words is not None and words.right else None

    # -- tokens -------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int] | None:
        """The token ids of `text`, or None if the tokenizer itself must be used."""
        if not self._is_allowed(text):
            return None
        ids: list[int] = []
        for number, piece in enumerate(self.cuts.split(text) if self.cuts is not None else [text]):
            if number % 2:
                ids.append(self.added[piece])
            elif piece:
                for word in self._cut(piece):
                    ids += self.table[word]
        return self._checked(text, ids)

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> Marked | None:
        """`encode`, with the tokens that begin inside one of `spans` marked."""
        if not self._is_allowed(text):
            return None
        ids: list[int] = []
        edges = [edge for span in spans for edge in span]
        places: list[int] = []  # for each edge, the first token that begins at it or after it
        straddles = False
        position = 0
        for number, piece in enumerate(self.cuts.split(text) if self.cuts is not None else [text]):
            end = position + len(piece)
            while len(places) < len(edges) and edges[len(places)] <= position:
                places.append(len(ids))
            if number % 2:
                ids.append(self.added[piece])
                while len(places) < len(edges) and edges[len(places)] < end:  # inside an added token
                    straddles |= not places
                    places.append(len(ids))
            elif piece:
                begin = position
                words = self._cut(piece)
                if len(places) < len(edges) and edges[len(places)] < end:
                    for at, word in enumerate(words):
                        tokens = self.table[word]
                        while len(places) < len(edges) and edges[len(places)] < begin + len(word):
                            inside = edges[len(places)] - begin
                            place, whole = _token_at(word, tokens, inside, self.backend)
                            straddles |= not places and not whole
                            places.append(len(ids) + place)
                        ids += tokens
                        begin += len(word)
                        if len(places) == len(edges) or edges[len(places)] >= end:
                            words = words[at + 1 :]
                            break
                    else:
                        words = []
                for word in words:
                    ids += self.table[word]
            position = end
        places += [len(ids)] * (len(edges) - len(places))
        if self._checked(text, ids) is None:
            return None
        mask = [False] * len(ids)
        for first, last in zip(places[::2], places[1::2], strict=True):
            mask[first:last] = [True] * (last - first)
        return Marked(ids, mask, straddles)

    def _cut(self, piece: str) -> list[str]:
        """The words of a text between added tokens."""
        steps: Sequence[Any] = self.ascii if piece.isascii() else self.unicode
        words = [piece]
        for step in steps:
            if len(words) == 1:
                words = _isolated(step, words[0])
            else:
                words = [part for word in words for part in _isolated(step, word)]
        return words

    # -- trust --------------------------------------------------------------------------------------------------------

    def _is_allowed(self, text: str) -> bool:
        """Whether the table may be used for a text: all of its characters are cut as the tokenizer cuts them."""
        if not self.right:
            return False
        if text.isascii():
            return True
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            return False
        trusted = self.trusted
        for character in set(text):
            if character not in trusted:
                trusted[character] = character.isascii() or self._is_cut_alike(character)
            if not trusted[character]:
                return False
        return True

    def _is_cut_alike(self, character: str) -> bool:
        probes = (
            f"a{character}a 1{character}1 {character} {character}a-{character}-",
            f"A{character}{character}\n'{character}",
        )
        for probe in probes:
            if self.nfc and not unicodedata.is_normalized("NFC", probe):
                return False
            theirs = [probe[start:end] for _, (start, end) in self.backend.pre_tokenizer.pre_tokenize_str(probe)]
            if theirs != self._cut(probe):
                return False
        return True

    def _checked(self, text: str, ids: list[int]) -> list[int] | None:
        """`ids`, or None if this text is one of those that are checked and the tokenizer gives other ids."""
        self.texts += 1
        if self.texts % CHECK_EVERY == 1 and self.backend.encode(text, add_special_tokens=False).ids != ids:
            self.right = False
            return None
        return ids

    def agrees_on_ascii(self) -> bool:
        """Whether the table gives the tokenizer's tokens for all pairs of ASCII characters and some more texts."""
        characters = [chr(code) for code in range(128)]
        texts = ["".join(one + other for other in characters) for one in characters]
        texts += [f"a{name} b\n{name}{name}c" for name in list(self.added)[:300]]
        texts += ["It's 1234 o'clock;\n\n  we'LL go -- to\t\tthe   \n sea?! (x_y=3.14)\r\n", "  ", "\n \n", "a  "]
        together = self.backend.encode_batch(texts, add_special_tokens=False)
        return all(self.encode(text) == found.ids for text, found in zip(texts, together, strict=True))


def _isolated(step: Any, text: str) -> list[str]:
    """The matches of `step` in a text, and the pieces between them, in their order."""
    if step.groups:  # rare matches, captured: most of the text lies between them
        return [word for word in step.split(text) if word]
    found = step.findall(text)
    if sum(map(len, found)) == len(text):
        return found
    words, position = [], 0
    for match in step.finditer(text):
        if match.start() > position:
            words.append(text[position : match.start()])
        if match.end() > match.start():
            words.append(match.group())
        position = max(position, match.end())
    return [*words, text[position:]] if position < len(text) else words


def _token_at(word: str, tokens: Sequence[int], inside: int, backend: Any) -> tuple[int, bool]:
    """The index of the first token of a word that begins at character `inside` or later.

    The second value is False if one token covers both that character and the one before it.
    """
    if inside == 0:
        return 0, True
    edge = len(word[:inside].encode())
    position = 0
    for place, token in enumerate(tokens):
        if position >= edge:
            return place, position == edge
        position += len(backend.id_to_token(token))  # each character of a token stands for a byte
    return len(tokens), position == edge


def _patterns(pre_tokenizer: Any) -> list[str]:
    """The regular expressions that cut a text into words, in their order. Raises `_Unknown` for any other step."""
    if pre_tokenizer is None:
        raise _Unknown
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    patterns: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [BYTE_LEVEL] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            patterns.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
        else:
            raise _Unknown
    if not patterns or steps[-1].get("type") != "ByteLevel":
        raise _Unknown
    return patterns


def _captured(pattern: str, translated: str) -> str:
    return f"({translated})" if pattern == DIGIT else translated


def _translated(pattern: str, ascii_only: bool) -> str:
    """A pattern of `tokenizers` for the module `regex`, or for `re`, which is faster, if it is for ASCII only.

    Raises `_Unknown` if it has no equal there.
    """
    result, in_class = [], False
    for item in ITEM.findall(pattern):
        if item.startswith("[") and not in_class:
            in_class = True
            result.append(item)
        elif item == "]":
            in_class = False
            result.append(item)
        elif item in (r"\s", r"\S"):
            inside = ASCII["s"] if ascii_only else SPACE
            if in_class and item == r"\S":
                raise _Unknown
            result.append(inside if in_class else f"[{'^' if item == chr(92) + 'S' else ''}{inside}]")
        elif item.startswith(r"\p{") and ascii_only:
            inside = ASCII.get(item[3:-1], None)  # type: ignore[assignment]
            if inside is None:
                raise _Unknown
            result.append(inside if in_class else f"[{inside}]" if inside else "(?!)")
        elif item.startswith((r"\p", r"\P")) and ascii_only or item in (r"\d", r"\w", r"\b", r"\D", r"\W"):
            raise _Unknown
        elif "&&" in pattern or item in ("(?>",):
            raise _Unknown
        else:
            result.append(item)
    translated = "".join(result).replace("[]", "(?!)")
    if re.search(r"\((?!\?)", re.sub(r"\\.", "", translated)):  # capturing groups change the result of `findall`
        raise _Unknown
    try:
        re.compile(translated) if ascii_only else regex.compile(translated)
    except (re.error, regex.error) as error:
        raise _Unknown from error
    return translated
