"""What every kind of answer of a token endpoint means, and that nothing a provider may send gets past that."""

import gzip
import json
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catfeeder_cron.oauth.answers import Ambiguous, Answer, Dead, Partial, Refused, Renewed, Transient
from catfeeder_cron.oauth.reading import MOST_BYTES, read

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
SENT = "the-refresh-token-that-was-sent"
CLIENT_SECRET = "the-client-secret-0123"
JSON = "application/json"
FORM = "application/x-www-form-urlencoded; charset=utf-8"


def answer(status: int, body: object, content_type: str = JSON, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": content_type} | {name.replace("_", "-"): value for name, value in headers.items()}
    return read(status, given, data, (SENT, CLIENT_SECRET), NOW)


TOKEN = {"access_token": "new", "token_type": "Bearer", "expires_in": 3600}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (TOKEN, JSON),
        (TOKEN, "text/html"),
        (TOKEN | {"error": None}, JSON),
        (TOKEN | {"refresh_token": None}, JSON),
        (TOKEN | {"refresh_token": ""}, JSON),
        (TOKEN | {"refresh_token": 5}, JSON),
        (TOKEN | {"refresh_token": "with\0nul"}, JSON),
        (b"access_token=new&expires_in=3600&scope=a+b&token_type=bearer", FORM),
    ],
)
def test_a_token_is_taken_and_the_old_refresh_token_kept_where_no_usable_one_comes(
    body: object, content_type: str
) -> None:
    assert answer(200, body, content_type) == Renewed("new", None, 3600)


@pytest.mark.parametrize("status", [200, 201])
def test_the_next_refresh_token_is_taken_and_its_end_where_the_provider_says_so(status: int) -> None:
    body = TOKEN | {"refresh_token": "next", "refresh_token_expires_in": 15897600}
    assert answer(status, body) == Renewed("new", "next", 3600, 15897600)
    assert answer(status, TOKEN | {"refresh_token": "next", "refresh_expires_in": "1800"}) == Renewed(
        "new", "next", 3600, 1800
    )
    assert answer(status, TOKEN | {"refresh_expires_in": 0}) == Renewed("new", None, 3600, None)


@pytest.mark.parametrize(
    ("said", "understood"),
    [
        (3600, 3600),
        (3599.7, 3599),
        ("3600", 3600),
        (" 3600.0 ", 3600),
        ("3.6e3", 3600),
        (0, 30),
        (-5, 30),
        ("-1", 30),
        (0.4, 1),
        (10**12, 400 * 86400),
        ("9" * 30, 400 * 86400),
        (int("9" * 400), 400 * 86400),
        (None, None),
        (True, None),
        ([], None),
        ("soon", None),
        ("1_000", None),
        ("٣٦٠٠", None),
        ("nan", None),
        ("Infinity", None),
        ("1e999", None),
        ("", None),
    ],
)
def test_a_lifetime_is_a_number_or_a_numeric_text_within_limits(said: object, understood: int | None) -> None:
    assert answer(200, {"access_token": "new", "expires_in": said}) == Renewed("new", None, understood)


def test_a_lifetime_that_json_does_not_know_is_nonsense() -> None:
    assert answer(200, b'{"access_token": "new", "expires_in": NaN}') == Renewed("new", None, None)
    assert answer(200, b'{"access_token": "new", "expires_in": -Infinity}') == Renewed("new", None, None)


@pytest.mark.parametrize("rest", [{}, {"access_token": None}, {"access_token": ["x"]}, {"access_token": "\0"}])
def test_a_refresh_token_alone_is_a_partial_answer(rest: dict[str, Any]) -> None:
    got = answer(200, {"refresh_token": "next", **rest})
    assert isinstance(got, Partial)
    assert got.refresh_token == "next"


@pytest.mark.parametrize(
    ("status", "body", "content_type"),
    [
        (400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}, JSON),
        (401, {"error": "invalid_grant"}, "text/plain"),
        (200, {"error": "bad_refresh_token"}, JSON),
        (200, b"error=bad_refresh_token&error_description=The+refresh+token+is+incorrect", FORM),
        (400, {"error": "interaction_required"}, JSON),
        (400, {"error": "consent_required"}, JSON),
        (400, {"status": 400, "message": "Invalid refresh token"}, JSON),
        (401, {"status": 401, "message": "invalid refresh token"}, JSON),
        (400, {"error": "invalid_request", "error_description": 'Invalid "refresh_token" in request.'}, JSON),
        (400, b"error=invalid_request&error_description=Invalid+%22refresh_token%22+in+request.", FORM),
        (400, {"message": "Bad Request", "errors": [{"field": "refresh_token", "code": "invalid"}]}, JSON),
    ],
)
def test_a_dead_token_is_the_users_to_replace(status: int, body: object, content_type: str) -> None:
    assert isinstance(answer(status, body, content_type), Dead)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "invalid_client"}),
        (403, {"error": "unauthorized_client"}),
        (400, {"error": "unsupported_grant_type"}),
        (400, {"error": "invalid_scope"}),
        (400, {"error": "invalid_request"}),
        (400, {"error": "invalid_request", "error_description": "Missing parameter: refresh_token"}),
        (200, {"error": "incorrect_client_credentials"}),
        (301, b"moved"),
        (302, b""),
        (307, TOKEN),
        (404, b"<html>nothing here"),
        (405, b""),
    ],
)
def test_what_the_provider_has_against_us_blames_no_user(status: int, body: object) -> None:
    got = answer(status, body)
    assert isinstance(got, Refused)
    assert not got.authentication


def test_only_401_invalid_client_says_that_the_other_method_may_do() -> None:
    assert answer(401, {"error": "invalid_client"}) == Refused("401: invalid_client", authentication=True)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"<html>oops"),
        (500, {"error": "server_error"}),
        (503, b""),
        (503, {"error": "temporarily_unavailable"}),
        (400, {"error": "temporarily_unavailable"}),
        (200, {"error": "internal_failure"}),
        (400, {"error": "internal_failure"}),
        (401, b"<html>who are you"),
        (403, b"<html>rate limited"),
        (403, {"message": "slow down"}),
        (400, {"error": "something_nobody_knows"}),
    ],
)
def test_some_troubles_may_pass(status: int, body: object) -> None:
    got = answer(status, body)
    assert isinstance(got, Transient)
    assert not got.throttled


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("1.5", 1.5),
        ("99999", 3600),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
        (format_datetime(NOW + timedelta(days=9), usegmt=True), 3600),
        ("-3", None),
        ("soon", None),
        ("", None),
    ],
)
def test_429_says_how_long_to_wait(told: str, seconds: float | None) -> None:
    for body in (b"", {"message": "You are being rate limited.", "error": "invalid_grant"}):
        got = answer(429, body, retry_after=told)
        assert isinstance(got, Transient)
        assert (got.throttled, got.retry_after) == (True, seconds)


def bomb() -> bytes:
    """Return few bytes that are 50 million when they are unpacked."""
    return gzip.compress(b"[" * 50_000_000)[:MOST_BYTES]


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, b"", {}),
        (200, b"<html><body>Sign in", {"content_type": "text/html"}),
        (200, b'{"access_token": "ne', {}),
        (200, b"access_token=new", {"content_type": "text/plain"}),
        (200, {}, {}),
        (200, [TOKEN], {}),
        (200, "new", {}),
        (200, {"access_token": ""}, {}),
        (200, {"access_token": "  "}, {}),
        (200, {"access_token": "a\0b"}, {}),
        (200, b'{"access_token": "\\ud800"}', {}),
        (200, b"\xff\xfe\x00", {}),
        pytest.param(200, b"[" * 60_000, {}, id="nested"),
        pytest.param(200, json.dumps(TOKEN).encode() + b" " * MOST_BYTES, {}, id="too long"),
        (200, bomb, {"content_encoding": "gzip"}),
        (200, gzip.compress(json.dumps(TOKEN).encode(), mtime=0)[:-9], {"content_encoding": "gzip"}),
        (200, b"no gzip at all", {"content_encoding": "gzip"}),
        (200, b"\x0b\x02\x80", {"content_encoding": "br"}),
        (204, b"", {}),
        (502, b"<html>bad gateway", {}),
        (504, b"", {}),
        (504, {"error": "server_error"}, {}),
    ],
)
def test_an_answer_that_tells_nothing_may_have_cost_the_refresh_token(
    status: int, body: object, headers: dict[str, str]
) -> None:
    assert isinstance(answer(status, body() if callable(body) else body, **headers), Ambiguous)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_packed_answer_is_read_although_none_was_asked_for(pack: Any) -> None:
    packed = pack(json.dumps(TOKEN).encode())
    coding = "gzip" if pack is gzip.compress else "deflate"
    assert answer(200, packed, content_encoding=coding) == Renewed("new", None, 3600)


@given(status=st.integers(100, 599), body=st.binary(max_size=300), coding=st.sampled_from(["", "gzip", "deflate"]))
def test_any_bytes_are_some_answer_and_no_token(status: int, body: bytes, coding: str) -> None:
    assert not isinstance(answer(status, body, content_encoding=coding), Renewed)


NESTED = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("access_token", "refresh_token", "expires_in", "error", "error_description", "message", "errors")


@given(status=st.sampled_from([200, 302, 400, 401, 429, 500, 502]), body=st.dictionaries(st.sampled_from(KEYS), NESTED))
def test_any_object_is_some_answer_whose_tokens_can_be_stored(status: int, body: dict[str, Any]) -> None:
    got = answer(status, body)
    for token in (getattr(got, "token", None), getattr(got, "refresh_token", None)):
        assert token is None or (token.isprintable() and token.strip() and token.encode())


ECHOES = [SENT, SENT[5:17], SENT.upper()[:0] + SENT[-8:], CLIENT_SECRET, "the%2Drefresh%2Dtoken%2Dthat"]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("key", ["error", "error_description", "message"])
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_reason_never_quotes_a_secret(status: int, key: str, echo: str) -> None:
    got = answer(status, {key: f"what is {echo}?"})
    assert not isinstance(got, Renewed)
    assert "what is" not in got.reason
    assert echo not in got.reason


def test_a_reason_never_quotes_a_token_that_came_with_an_error() -> None:
    fresh = "freshly-handed-out-123"
    got = answer(200, {"error": "server_error", "id_token": fresh, "error_description": f"for {fresh}"})
    assert isinstance(got, Transient)
    assert fresh not in got.reason


def test_a_reason_is_one_short_line() -> None:
    got = answer(400, {"error": "invalid_grant", "error_description": "a\nb\x1b[31m\u202e" + "c" * 1000})
    assert isinstance(got, Dead)
    assert got.reason.startswith("400: invalid_grant a b [31m")
    assert got.reason.isprintable()
    assert len(got.reason) < 300


def test_no_answer_shows_its_tokens() -> None:
    for got in (answer(200, TOKEN | {"refresh_token": "next-one"}), answer(200, {"refresh_token": "next-one"})):
        assert "next-one" not in repr(got)
        assert "'new'" not in repr(got)
