"""Retry-After, as a server may send it."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from catfeeder_cron.times import retry_after_seconds, sender_now

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("17", 17),
        (" 17 ", 17),
        ("1.5", 1.5),
        ("0", 0),
        ("-3", None),
        ("soon", None),
        ("99999999999999999999", 3600),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0),
        (format_datetime(NOW + timedelta(days=90), usegmt=True), 3600),
        ("Sun, 01 Mar 2026 00:01:00", 60),
        ("Wed, 99 Foo 2026 00:00:00 GMT", None),
        ("²", None),
    ],
)
def test_it_is_read_as_seconds_or_as_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW, most=3600) == seconds


def test_a_date_counts_from_the_senders_clock_however_wrong_ours_is() -> None:
    now = sender_now("Wed, 21 Oct 2015 07:28:00 GMT", NOW)
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:30 GMT", now, most=3600) == 30
    assert sender_now(None, NOW) == sender_now("soon", NOW) == NOW
