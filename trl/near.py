"""The word that was probably meant: one rule for all hints."""

from collections.abc import Iterable

# Words above this similarity differ by a typing error or an ending. Below it, a hint names an unrelated word
# (`log_level` for `token_level_kl`), which is worse than no hint.
LIKENESS = 0.75


def near(word: str, words: Iterable[str]) -> str | None:
    """The most similar of `words`, or None if none is similar enough."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(words), n=1, cutoff=LIKENESS)), None)
