"""When a server that turned a request away wants to be asked again."""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"\d{1,30}(\.\d{1,9})?", re.ASCII)


def retry_after_seconds(value: str | None, now: datetime, most: float) -> float | None:
    """Read a Retry-After header (RFC 9110, section 10.2.3: seconds or a date), at most `most` seconds.

    None where there is none, or nonsense.
    """
    value = (value or "").strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), most)
    try:
        date = parsedate_to_datetime(value)
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    return min(max(0.0, seconds), most)
