"""The types of the configuration's values other than durations. The text of their ValueError is the expected value."""

import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator, SecretStr, Strict

from catfeeder_cron.config.suggestions import did_you_mean

_PYTHON_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_REFERENCE = re.compile(f"{_PYTHON_NAME}:{_PYTHON_NAME}")
_OTHER_DATABASE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_CONNINFO = re.compile(r"postgres(ql)?://.*|embedded:\s*\S.*|\s*[a-z_]+\s*=.*")


class Table(BaseModel):
    """A TOML table. Unknown keys and values of another type are faults; its values can't be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


def _zone(value: object) -> ZoneInfo:
    if isinstance(value, ZoneInfo):
        return value
    suggestion = ""
    if isinstance(value, str):
        try:
            return ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            suggestion = did_you_mean(value, available_timezones())
    raise ValueError(f'a time zone such as "UTC" or "Europe/Paris"{suggestion}')


def _name_in_postgresql(value: str) -> str:
    if not 1 <= len(value.encode()) <= 63 or "\0" in value:
        raise ValueError("a name of 1 to 63 bytes")
    return value


def _reference(value: str) -> str:
    if not _REFERENCE.fullmatch(value):
        raise ValueError('"package.module:function"')
    return value


def split_http_url(value: str) -> SplitResult | None:
    """Return the parts of an http or https URL that every client reads in one way, or None if it is no such URL.

    Its port can be read without an error; it may be 0.
    """
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return None
    is_usable = value.isprintable() and " " not in value and "\\" not in value
    return parts if is_usable and parts.scheme in ("http", "https") and parts.hostname else None


def _is_url(value: str) -> bool:
    parts = split_http_url(value)
    return parts is not None and parts.port != 0


def _ping_url(value: SecretStr) -> SecretStr:
    if not _is_url(value.get_secret_value()):
        raise ValueError('a URL, "https://..."')
    return value


def _url_prefix(value: str) -> str:
    if not _is_url(value) or any(character in value for character in "?#@"):
        raise ValueError('an origin and a path, "https://host/path/", without user, query or fragment')
    return value


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    named = bool(host) and host.isprintable() and not set(host) & set(" /:[]")
    # Port 0 lets the system choose one.
    if not (named or bracketed) or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError('"host:port", such as "127.0.0.1:9464" or "[::1]:9464"')
    return value


def check_conninfo(value: str) -> str:
    """Return a value that is valid as database.url: libpq's conninfo, "embedded:PATH", or empty. Raises ValueError."""
    if value and not (value.isprintable() and _CONNINFO.fullmatch(value)):
        only = "; no other database than PostgreSQL is supported" if _OTHER_DATABASE.match(value) else ""
        raise ValueError(
            f'"postgresql://...", "embedded:PATH", or pairs such as "host=/run/postgresql dbname=catfeeder"{only}'
        )
    return value


def _secret_conninfo(value: SecretStr) -> SecretStr:
    check_conninfo(value.get_secret_value())
    return value


def _file_name(value: str) -> str:
    if not value or not value.isprintable() or "://" in value:
        raise ValueError("the path of a file that holds the URL (the URL itself goes into url)")
    return value


Zone = Annotated[ZoneInfo, PlainValidator(_zone)]
PostgreSQLName = Annotated[str, AfterValidator(_name_in_postgresql)]
CallableName = Annotated[str, AfterValidator(_reference)]
PingURL = Annotated[SecretStr, AfterValidator(_ping_url)]
URLPrefixes = Annotated[tuple[Annotated[str, AfterValidator(_url_prefix)], ...], Strict(False)]
Address = Annotated[str, AfterValidator(_address)]
Conninfo = Annotated[SecretStr, AfterValidator(_secret_conninfo)]
FileName = Annotated[str, AfterValidator(_file_name)]
