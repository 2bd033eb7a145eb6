"""Make a provider's text fit for a log: in one line, cut to a length, and without secrets."""

from collections.abc import Iterable
from urllib.parse import unquote_plus

from catfeeder_cron.logs import printable_line

_LONGEST = 200
_TELLING = 8
"""So many characters of a secret in a row count as quoting it."""

WITHHELD = "(its text is withheld: it quotes what was sent)"


def quote(text: object, secrets: Iterable[str]) -> str:
    """Return a provider's text as it may be logged; WITHHELD if it quotes one of `secrets`, encoded or not."""
    if not isinstance(text, str):
        return ""
    readings = (text, unquote_plus(text))
    if any(_quotes(reading, secret) for secret in secrets for reading in readings):
        return WITHHELD
    line = printable_line(text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _quotes(text: str, secret: str) -> bool:
    if not secret:
        return False
    if len(secret) <= _TELLING:
        return secret in text
    return any(secret[start : start + _TELLING] in text for start in range(len(secret) - _TELLING + 1))
