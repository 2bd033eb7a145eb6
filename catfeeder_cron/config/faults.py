"""Collect all faults of a file, so that they are reported at once, a line for each: `FILE: KEY: got X, expected Y`.

A fault in a part of the file that belongs to another program is only a warning, and the file is used.

A value that may be a secret is never shown: one under a key such as `password`, one that holds a URL or a password,
one under an unknown key.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from catfeeder_cron.config.suggestions import did_you_mean
from catfeeder_cron.errors import ConfigurationError
from catfeeder_cron.times import format_duration

Where = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)

_BARE_KEY = re.compile("[A-Za-z0-9_-]+")
_SECRET_KEY = re.compile("(url|url_file|secret|token|password|key|credential)$")
_SECRET_TEXT = re.compile("://|passw", re.IGNORECASE)
_LONGEST_SHOWN = 60
_EXPECTED = {
    "bool_type": "true or false",
    "datetime_type": "a date with a time, such as 2026-12-24T06:00:00Z",
    "dict_type": "a table",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a table",
    "string_type": "text",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}


class Faults:
    """The faults of one file, collected while it is read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: list[str] = []
        self._warnings: list[str] = []

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings, a line for each."""
        return tuple(self._warnings)

    def add(self, where: Where, text: str) -> None:
        """Add a fault of the key at `where`."""
        self._lines.append(f"{self._file}: {spell(where)}: {text}")

    def extend(self, error: ConfigurationError) -> None:
        """Add the faults of an error."""
        self._lines.extend(error.faults)

    def unknown(self, where: Where, known: Iterable[str]) -> None:
        """Add that the key at `where` is unknown, with a suggestion."""
        keys = sorted(known)
        self.add(where, "unknown key" + (did_you_mean(str(where[-1]), keys) or f", expected one of {', '.join(keys)}"))

    def ignore(self, where: Where, known: Iterable[str]) -> None:
        """Add a warning that the key at `where` is unknown and has no effect, with a suggestion."""
        meant = did_you_mean(str(where[-1]), known)
        self._warnings.append(f"{self._file}: {spell(where)}: unknown key, which has no effect{meant}")

    def mistyped(self, where: Where, value: object, expected: str) -> None:
        """Add that the key at `where` has a value of the wrong kind."""
        self.add(where, f"got {_kind(value)}, expected {expected}")

    def check(self, model: type[M], value: object, where: Where, context: Mapping[str, Any] | None = None) -> M | None:
        """Return the valid model, or None after adding all faults that pydantic found in `value`."""
        try:
            return model.model_validate(value, context=context)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                place = (*where, *detail["loc"])
                if detail["type"] == "extra_forbidden":
                    self.unknown(place, _keys(model, detail["loc"][:-1]))
                elif detail["type"] == "missing":
                    self.add(place, "missing, and it has no default")
                else:
                    self.add(place, f"got {_shown(place, detail)}, expected {_expected(detail)}")
            return None

    def raise_if_any(self) -> None:
        """Raise ConfigurationError with all faults, if there is any."""
        if self._lines:
            raise ConfigurationError(self._lines)


def spell(where: Where) -> str:
    """Return the key in TOML's spelling: `jobs.clean-tokens.interval`, `jobs."my job".interval`."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _BARE_KEY.fullmatch(part) else _quoted(part))
    return text


def _expected(detail: ErrorDetails) -> str:
    kind, facts = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(facts["error"])
    if kind == "literal_error":
        return str(facts["expected"]).replace("'", '"')
    if kind in _BOUNDS:
        return _BOUNDS[kind].format_map(facts)
    return _EXPECTED.get(kind, detail["msg"])


def _shown(where: Where, detail: ErrorDetails) -> str:
    value = detail["input"]
    key = next(part for part in reversed(where) if isinstance(part, str))
    if _SECRET_KEY.search(key):
        return _kind(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        secret = _SECRET_TEXT.search(value) or _EXPECTED.get(detail["type"]) in ("a table", "a list")
        return _kind(value) if secret or len(value) > _LONGEST_SHOWN else _quoted(value)
    if isinstance(value, int | float) and not abs(value) >= 1e15:
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):  # a default, or an interval of [Crons]
        return format_duration(value)
    return _kind(value)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "text"),
        ((int, float), "a number"),
        (dict, "a table"),
        (list, "a list"),
        (datetime, "a date with a time"),
        (date, "a date"),
        (time, "a time of day"),
    )
    return next((name for types, name in kinds if isinstance(value, types)), "something else")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _keys(table: Any, where: Where) -> list[str]:
    """Return the keys that the table at `where` inside a model may have."""
    for part in where:
        if get_origin(table) is dict:
            table = get_args(table)[1]
        elif part in (fields := _fields(table)):
            table = fields[str(part)]
        else:
            table = get_args(table.__annotations__["__pydantic_extra__"])[1]
    return list(_fields(table))


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}
