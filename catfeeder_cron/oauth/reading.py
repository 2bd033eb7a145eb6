"""Read a response of a token endpoint. No I/O; every possible response gives an Answer, never an exception."""

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl

from catfeeder_cron.oauth.answers import Ambiguous, Answer, Dead, Partial, Refused, Renewed, Transient
from catfeeder_cron.oauth.quoting import quote
from catfeeder_cron.times import retry_after_seconds, sender_now

MOST_BYTES = 64 * 1024
"""A longer body, as sent or unpacked, is not read."""

_LONGEST_TOKEN = 32 * 1024
_LONGEST_LIFESPAN = 400 * 86_400
_SHORTEST_LIFESPAN = 30
_LONGEST_RETRY_AFTER = 3600.0

_DEAD = {"invalid_grant", "bad_refresh_token", "interaction_required", "consent_required", "login_required"}
_REFUSED = {
    *("invalid_client", "unauthorized_client", "unsupported_grant_type", "invalid_scope", "invalid_request"),
    "incorrect_client_credentials",  # GitHub, inside a 200
}
_OUT_OF_ORDER = {"server_error", "temporarily_unavailable", "internal_failure"}
_MAY_HAVE_ROTATED = {502, 504}

_NUMBER = re.compile(r"\s*[+-]?\d{1,30}(\.\d{0,30})?([eE][+-]?\d{1,3})?\s*", re.ASCII)
_NAMES_REFRESH_TOKEN = re.compile(r"refresh[ _]token", re.IGNORECASE)
_SAYS_INVALID = re.compile(r"\binvalid\W+refresh[ _]token", re.IGNORECASE)
_SAYS_MISSING = re.compile(r"missing|required|must", re.IGNORECASE)


class Unreadable(ValueError):
    """The body is no object with keys. The text gives the reason."""


def read(status: int, headers: Mapping[str, str], body: bytes, secrets: Iterable[str], now: datetime) -> Answer:
    """Return the meaning of a complete response. `body` is as it was sent, at most a little longer than MOST_BYTES.

    No `reason` quotes one of `secrets`. An HTTP date in Retry-After counts from the answer's Date, else from `now`.
    """
    secrets = tuple(secrets)
    try:
        fields = _fields(headers, body)
        trouble = ""
    except Unreadable as unreadable:
        fields, trouble = {}, str(unreadable)
    code = fields.get("error")
    code = code if isinstance(code, str) else ""
    retry_after = retry_after_seconds(
        headers.get("retry-after"), sender_now(headers.get("date"), now), _LONGEST_RETRY_AFTER
    )
    secrets = (*secrets, *_tokens(fields))
    reason = _reason(status, code or trouble, fields, secrets)
    if 200 <= status < 300:
        return _read_success(fields, code, reason, secrets)
    if 300 <= status < 400:
        return Refused(f"{status}: it redirects, which is not followed")
    if status == 429:
        return Transient(reason, throttled=True, retry_after=retry_after)
    if status in _MAY_HAVE_ROTATED:
        return Ambiguous(reason)
    if code:
        return _read_error(status, code, fields, reason, retry_after)
    if status < 500 and _is_dead_without_code(fields):
        return Dead(reason)
    if status in (404, 405, 410):
        return Refused(f"{status}: there is no token endpoint at this URL")
    if status == 408:
        return Ambiguous(reason)
    return Transient(reason, retry_after=retry_after)


def _read_success(fields: Mapping[str, Any], code: str, reason: str, secrets: tuple[str, ...]) -> Answer:
    token, refresh_token = _usable(fields.get("access_token")), _usable(fields.get("refresh_token"))
    if token:
        refresh_lifespan = fields.get("refresh_token_expires_in", fields.get("refresh_expires_in"))
        return Renewed(token, refresh_token, _lifespan(fields.get("expires_in")), _refresh_lifespan(refresh_lifespan))
    if refresh_token:
        return Partial(refresh_token, "it sent a refresh token without a usable access token")
    if code:
        return _read_error(200, code, fields, _reason(200, code, fields, secrets), None)
    return Ambiguous(f"{reason}, without a usable access token")


def _read_error(status: int, code: str, fields: Mapping[str, Any], reason: str, retry_after: float | None) -> Answer:
    if code in _DEAD or (code == "invalid_request" and _blames_refresh_token(fields)):
        return Dead(reason)
    if code in _REFUSED:
        return Refused(reason, authentication=status == 401 and code == "invalid_client")
    unknown = status < 500 and code not in _OUT_OF_ORDER
    return Transient(reason, retry_after=retry_after, unknown=unknown)


def _blames_refresh_token(fields: Mapping[str, Any]) -> bool:
    """Return whether the description blames the token, as Discord's 'Invalid "refresh_token" in request.' does."""
    text = fields.get("error_description")
    return isinstance(text, str) and bool(_NAMES_REFRESH_TOKEN.search(text)) and not _SAYS_MISSING.search(text)


def _is_dead_without_code(fields: Mapping[str, Any]) -> bool:
    """Return whether an answer without `error` calls the refresh token invalid.

    Twitch sends {"status": 400, "message": "Invalid refresh token"}, Strava a list `errors` that names the field.
    """
    message, errors = fields.get("message"), fields.get("errors")
    if isinstance(message, str) and _SAYS_INVALID.search(message):
        return True
    return isinstance(errors, list) and any(
        isinstance(error, dict) and error.get("field") == "refresh_token" and error.get("code") == "invalid"
        for error in errors
    )


def _fields(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Return the object in a body: JSON of any content type, or a form that is declared as one (GitHub's default)."""
    text = _unpacked(headers.get("content-encoding", ""), body)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        if "x-www-form-urlencoded" not in headers.get("content-type", "").lower():
            raise Unreadable("no JSON") from None
        try:
            document = dict(parse_qsl(text.decode("utf-8"), max_num_fields=100))
        except ValueError:
            raise Unreadable("no form") from None
    if not isinstance(document, dict):
        raise Unreadable("no JSON object")
    return document


def _unpacked(encoding: str, body: bytes) -> bytes:
    """Undo a content coding that we did not ask for, up to MOST_BYTES: a small body could unpack to gigabytes."""
    if len(body) > MOST_BYTES:
        raise Unreadable("too large")
    match encoding.strip().lower():
        case "" | "identity":
            return body
        case "gzip" | "x-gzip" | "deflate":
            unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        case _:
            raise Unreadable("packed in a way that was not asked for")
    try:
        text = unpacker.decompress(body, MOST_BYTES + 1)
    except zlib.error:
        raise Unreadable("packed, and broken") from None
    if len(text) > MOST_BYTES:
        raise Unreadable("too large when unpacked")
    if not unpacker.eof:
        raise Unreadable("packed, and cut off")
    return text


def _usable(token: object) -> str | None:
    """Return a token if a form and a database column can hold it (RFC 6749, appendix A, and a little more)."""
    if not isinstance(token, str) or not token.strip() or len(token) > _LONGEST_TOKEN or not token.isprintable():
        return None
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return token


def _tokens(fields: Mapping[str, Any]) -> list[str]:
    return [value for key, value in fields.items() if "token" in key and isinstance(value, str)]


def _lifespan(value: object) -> int | None:
    """Return whole seconds from a number or a numeric text; None if it is missing or not a number."""
    seconds = _number(value)
    if seconds is None:
        return None
    return _SHORTEST_LIFESPAN if seconds <= 0 else max(1, int(min(seconds, _LONGEST_LIFESPAN)))


def _refresh_lifespan(value: object) -> int | None:
    """Return whole seconds, or None for no limit: Keycloak sends 0 for a refresh token that never ends."""
    seconds = _number(value)
    return None if seconds is None or seconds <= 0 else int(min(seconds, 100 * _LONGEST_LIFESPAN))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    if isinstance(value, int):  # it may have hundreds of digits, which is too large for a float
        return float(max(-(10**15), min(value, 10**15)))
    number = float(value)
    return number if math.isfinite(number) else None


def _reason(status: int, what: str, fields: Mapping[str, Any], secrets: Iterable[str]) -> str:
    secrets = tuple(secrets)
    described = fields.get("error_description", fields.get("message"))
    quoted = [quote(what, secrets), quote(described, secrets)]
    return " ".join([f"{status}:", *(part for part in quoted if part)]) if any(quoted) else str(status)
