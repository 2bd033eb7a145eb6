"""An answer as a line in a file, and its age."""

import json
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

from catfeeder_cron.oauth.reading import MOST_BYTES
from catfeeder_cron.times import elapsed_seconds

LONGEST_LINE = 2 * MOST_BYTES + 1024
"""More bytes than any answer takes: each byte of a body becomes two at most, where JSON escapes it."""

# The byte between the checksum and the text, which the checksum leaves out, so that a single byte is written over.
_PENDING, _SETTLED = b" ", b"+"
MARK_AT = 8
SETTLED_MARK = _SETTLED

_SENT, _NEXT = b'"sent": "', b'"next": "'
_HASH_LENGTH = 64


@dataclass(frozen=True)
class Entry:
    """An answer that has to be stored. A field that is None leaves its column unchanged."""

    id: int
    sent: str
    """The hash of the refresh token that was sent, in hex."""
    asked_at: float
    """When the request was sent, on the wall clock, which goes on over a restart of the machine, but may be wrong."""
    token: str | None = field(repr=False)
    refresh_token: str | None = field(repr=False)
    lifespan: int | None
    """Seconds from `asked_at`, as the provider said, or else its usual lifespan."""
    lifespan_is_said: bool
    refresh_lifespan: int | None
    asked_elapsed: float | None = None
    """When the request was sent, in `elapsed_seconds`, which count from the start of the machine named by `boot`."""
    boot: str = ""
    provider: str = ""
    """The name of the provider that sent it."""

    @property
    def next(self) -> str | None:
        """The hash of the refresh token that takes the place of the one that was sent; None if that one lives on."""
        if self.refresh_token is None:
            return None
        hashed = sha256(self.refresh_token.encode()).hexdigest()
        return None if hashed == self.sent else hashed

    def of_row(self, id: int) -> "Entry":
        """Return the answer for the row with this id, which holds the refresh token that was sent."""
        return replace(self, id=id)

    def age_seconds(self) -> float:
        """Return how long ago the request was sent.

        As long as the machine has not been restarted, no setting of its clock matters. After a restart only the wall
        clock is left, which may have been wrong then or now: an age that it can't have counts as the whole lifespan,
        so that the token is renewed early rather than late.
        """
        if self.asked_elapsed is not None and self.boot == boot_id():
            age = elapsed_seconds() - self.asked_elapsed
            if age >= 0:
                return age
        age, longest = time.time() - self.asked_at, float(self.lifespan or 0)
        return age if 0 <= age <= longest else longest

    def is_newer_than(self, other: "Entry") -> bool:
        """Tell whether this answer was asked for later than another one."""
        if None not in (self.asked_elapsed, other.asked_elapsed) and self.boot == other.boot:
            return (self.asked_elapsed or 0) > (other.asked_elapsed or 0)
        return self.asked_at > other.asked_at


@dataclass(frozen=True)
class RequestTime:
    """The time of a request, on both clocks."""

    at: float
    elapsed: float
    boot: str

    @classmethod
    def now(cls) -> "RequestTime":
        """Return the present time."""
        return cls(time.time(), elapsed_seconds(), boot_id())


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Return the id that Linux gives to each start of the machine; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", "")
    except (OSError, ValueError):
        return ""


def line_of(entry: Entry) -> bytes:
    """Return the line that holds the answer. A power cut may mix two lines, so each begins with its checksum."""
    # The hashes come before the tokens, so that an index finds them without reading the rest.
    fields: dict[str, Any] = {"id": entry.id, "sent": entry.sent, "next": entry.next}
    text = json.dumps(fields | vars(entry), ensure_ascii=False).encode()
    return b"%08x%b%b\n" % (crc32(text), _PENDING, text)


def entry_of(line: bytes) -> Entry:
    """Return the answer in a line. Raises ValueError or TypeError if there is no whole one."""
    fields = json.loads(_text_of(line))
    fields.pop("next", None)
    return Entry(**fields)


def is_settled(line: bytes) -> bool:
    """Tell whether the answer was stored, or came too late for its row."""
    return line[MARK_AT : MARK_AT + 1] == _SETTLED


def replaced_hash(line: bytes) -> bytes | None:
    """Return the hash of the refresh token that this answer has replaced, in hex; None if it has replaced none.

    Raises ValueError if the line is damaged.
    """
    text = _text_of(line)
    # Inside a JSON string a quotation mark follows a backslash, so no token can look like one of these keys.
    if text.find(_NEXT) < 0:
        return None
    start = text.index(_SENT) + len(_SENT)
    return text[start : start + _HASH_LENGTH]


def _text_of(line: bytes) -> bytes:
    line = line.rstrip(b"\n")
    text = line[MARK_AT + 1 :]
    if line[MARK_AT : MARK_AT + 1] not in (_PENDING, _SETTLED) or line[:MARK_AT] != b"%08x" % crc32(text):
        raise ValueError("torn")
    return text
