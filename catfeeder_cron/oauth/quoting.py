"""A provider's words, made fit for a log: cut, in one line, and never with a secret in them."""

from collections.abc import Iterable
from urllib.parse import unquote_plus

_LONGEST = 200
_TELLING = 8
"""Characters of a secret in a row that give it away."""

WITHHELD = "(its text is withheld: it quotes what was sent)"


def quote(text: object, secrets: Iterable[str]) -> str:
    """Return what may be shown of a text that came from outside. It may quote parts of `secrets`, encoded or not."""
    if not isinstance(text, str):
        return ""
    readings = (text, unquote_plus(text))
    if any(_gives_away(reading, secret) for secret in secrets for reading in readings):
        return WITHHELD
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _gives_away(text: str, secret: str) -> bool:
    if not secret:
        return False
    if len(secret) <= _TELLING:
        return secret in text
    return any(secret[start : start + _TELLING] in text for start in range(len(secret) - _TELLING + 1))
