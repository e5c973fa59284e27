"""The word that was probably meant: one rule for all hints."""

from collections.abc import Iterable

# Words above this similarity differ by a typing error or an ending. Below it, a hint names an unrelated word
# (`log_level` for `token_level_kl`), which is worse than no hint.
LIKENESS = 0.75


def near(word: str, words: Iterable[str]) -> str | None:
    """The most similar of `words`, else one of the same letters in another order, or None."""
    from difflib import get_close_matches

    words = list(words)
    similar = get_close_matches(word, words, n=1, cutoff=LIKENESS)
    similar += [each for each in words if sorted(each) == sorted(word)]  # `stf` for `sft`: short words differ in much
    return next(iter(similar), None)
