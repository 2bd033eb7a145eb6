"""Zones whose clocks change when a test needs it, by POSIX rules that stand in the names and that PostgreSQL reads."""

from datetime import UTC, datetime, timedelta
from io import BytesIO
from zoneinfo import ZoneInfo

STANDARD, SUMMER = timedelta(hours=1), timedelta(hours=2)


def set_back(when: timedelta) -> ZoneInfo:
    """A zone whose clocks are set back by an hour, from 2 to 1 hours before UTC, so long from now."""
    change = datetime.now(UTC) + when
    return _zone(change - timedelta(days=100) + STANDARD, change + SUMMER)


def set_forward(when: timedelta) -> ZoneInfo:
    """A zone whose clocks are set forward by an hour, so long from now."""
    change = datetime.now(UTC) + when
    return _zone(change + STANDARD, change + timedelta(days=100) + SUMMER)


def _zone(begins: datetime, ends: datetime) -> ZoneInfo:
    return named(f"CAT-1CATS-2,{_rule(begins)},{_rule(ends)}")


def _rule(wall: datetime) -> str:
    return f"{wall.timetuple().tm_yday - 1}/{wall:%H:%M:%S}"


def named(key: str) -> ZoneInfo:
    """A zone of that name. PostgreSQL alone reads the name; for Python it is UTC."""
    tzif = b"TZif" + bytes(16) + b"\0\0\0\0" * 4 + b"\0\0\0\1\0\0\0\4" + b"\0\0\0\0\0\0UTC\0"
    return ZoneInfo.from_file(BytesIO(tzif), key=key)
