"""The word that was probably meant: one rule for every hint."""

from collections.abc import Iterable

# Two words of this likeness differ by a slip of the finger or an ending. Below it a hint points at a stranger
# (`token_level_kl` at `log_level`), which is worse than none.
LIKENESS = 0.75


def near(word: str, words: Iterable[str]) -> str | None:
    """The most similar of `words`, if any is really near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(words), n=1, cutoff=LIKENESS)), None)
