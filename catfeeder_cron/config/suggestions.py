"""Suggest the known word that was probably meant by an unknown one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, candidates: Iterable[str], least: float = 0.6) -> str | None:
    """Return the candidate that is most similar to `word`, ignoring case, or None if none is similar enough.

    `least` is the similarity that is needed: 0 accepts any candidate, 1 only an equal one.
    """
    by_folded = {candidate.casefold(): candidate for candidate in sorted(candidates)}
    matches = get_close_matches(word[:100].casefold(), by_folded, n=1, cutoff=least)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean `candidate`?", or an empty text if no candidate is similar enough."""
    match = nearest(word, candidates)
    return f"; did you mean `{match}`?" if match else ""
