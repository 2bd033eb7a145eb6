"""Take secrets out of log entries, and make foreign text fit to be logged."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.typing import EventDict

_REDACTED = "[redacted]"
_SECRET_KEY = re.compile(r"token|secret|passw|authorization|refresh_link|cookie|api_?key", re.IGNORECASE)
_SECRET_TEXTS = (
    # scheme://user:PASSWORD@host; libpq ends the password at the first @ and allows no slash in it.
    (re.compile(r"(://[^\s/?#:@]*:)[^\s/]*@"), rf"\1{_REDACTED}@"),
    # "password=..." in a conninfo string, "access_token=..." in a query string.
    (re.compile(r"((?:token|secret|password)=)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)"), rf"\1{_REDACTED}"),
    (re.compile(r"\b(Bearer|Basic) +[\w.~+/=-]+"), rf"\1 {_REDACTED}"),
    # PostgreSQL's DETAIL quotes the values of the row, over several lines where a value has several.
    (re.compile(r"\bDETAIL: .*?(?=\n\n(?:The above|During handling)|\Z)", re.DOTALL), f"DETAIL: {_REDACTED}"),
)


def printable_line(text: str) -> str:
    """Return the text in one line of printable characters, with single spaces between its words."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def one_line(text: str) -> str:
    """Return foreign text in one line of at most 500 characters, without the secrets that can be seen in it.

    All of it is printable, so it moves no terminal's cursor, and PostgreSQL can store it (no NUL, no lone surrogate).
    """
    return _without_secrets(printable_line(text))[:500]


def redact(_logger: Any, _method: str, event_dict: "EventDict") -> "EventDict":
    """Return the entry without secrets. This is the last defence, for secrets that should never have been logged.

    It replaces texts under a key that names a secret, and secrets that can be recognised inside a text. Numbers stay:
    `tokens=12` is a count. All values become ones that JSON can hold.
    """
    return {
        key: value if key == "exc_info" else _plain(value, secret=bool(_SECRET_KEY.search(key)))
        for key, value in event_dict.items()
    }


def _plain(value: object, *, secret: bool = False) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case Mapping():
            return {
                str(key): _plain(item, secret=secret or bool(_SECRET_KEY.search(str(key))))
                for key, item in value.items()
            }
        case list() | tuple() | set() | frozenset():
            return [_plain(item, secret=secret) for item in value]
        case _ if secret:
            return _REDACTED
        case datetime():
            return value.isoformat(timespec="milliseconds")
        case _:
            return _without_secrets(str(value))


def _without_secrets(text: str) -> str:
    for pattern, replacement in _SECRET_TEXTS:
        text = pattern.sub(replacement, text)
    return text
