"""What somebody probably meant who wrote a word that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, candidates: Iterable[str], least: float = 0.6) -> str | None:
    """Return the candidate that is nearest to `word`, whatever its case, or None where none is near.

    `least` is how alike they have to be: 0 takes any, 1 the same word.
    """
    by_folded = {candidate.casefold(): candidate for candidate in sorted(candidates)}
    matches = get_close_matches(word[:100].casefold(), by_folded, n=1, cutoff=least)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean `candidate`?", or nothing where no candidate is near."""
    match = nearest(word, candidates)
    return f"; did you mean `{match}`?" if match else ""
