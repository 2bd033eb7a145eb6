"""Notices that the database went back, by what this process has heard of it and what its host remembers.

The host's memory is a small file in the state folder, one for each database: it outlives the process. It tells a new
process that the server is an old copy (a former primary that came back), or a restored one.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import UUID

from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.logs import get_logger
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.database")

_WRITE_EVERY_SECONDS = 60
# The others delete the row of a process that they have not heard of for a day.
_ROW_LASTS_SECONDS = 86_000
_NEVER = float("-inf")


@dataclass(frozen=True)
class _Memory:
    """What was known of the database when it was used last. A timeline is hexadecimal, empty where it is not told."""

    id: str
    counter: int
    system: str
    timeline: str


class LineageWatch:
    """What this process knows of the lineage. All methods may be called from any thread.

    Without a folder, or with one that can't be written to, it knows only what the process has heard itself.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._remembered: _Memory | None = None
        self._beats = 0
        self._counter = 0
        self._id: UUID | None = None
        self._since: datetime | None = None
        self._stale = ""
        self._heard_at = self._written_at = _NEVER
        # Held while an answer is taken in and written down, by the thread that beats or that ends the process.
        self._lock = Lock()

    def recall(self, identity: UUID) -> None:
        """Read what the host remembers of the database with this identity; called before the first heartbeat.

        The folder is made if it is not there.
        """
        with self._lock:
            if self._folder is None:
                return
            with suppress(OSError):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(self._folder):
                return
            self._path = self._folder / f"database-{identity}.json"
            with suppress(OSError, ValueError, TypeError):  # absent, or written by something else
                self._remembered = _Memory(**json.loads(self._path.read_text("utf-8")))
                self._counter = max(self._counter, int(self._remembered.counter))

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of a heartbeat: what this process knows of the lineage, and of heartbeats."""
        with self._lock:
            forgotten = elapsed_seconds() - self._heard_at > _ROW_LASTS_SECONDS
            return {
                "counter": self._counter,
                "beats": 0 if forgotten else self._beats,
                "lineage": self._id,
                "since": self._since,
            }

    def heard(self, lineage: Lineage) -> Lineage:
        """Take in the answer to a heartbeat; return it with the reason if the server is an old copy.

        Logs once that the database went back, or is an old copy.
        """
        with self._lock:
            self._beats += 1
            self._counter = lineage.counter
            self._heard_at = elapsed_seconds()
            before, self._id, self._since = self._id or self._remembered_id(), lineage.id, lineage.since
            lineage = replace(lineage, stale=self._why_stale(lineage))
            was_stale, self._stale = self._stale, lineage.stale
            is_new = before is not None and before != lineage.id
            if is_new or self._heard_at - self._written_at > _WRITE_EVERY_SECONDS:
                self._write(lineage)
        if lineage.stale and not was_stale:
            log.error("database_is_an_old_copy", reason=lineage.stale)
        elif is_new:
            log.error("history_went_back", since=lineage.since, reason=lineage.reason)
        return lineage

    def close(self) -> None:
        """Have the next process know as much as this one."""
        with self._lock:
            if self._remembered and self._written_at > _NEVER:
                self._save(replace(self._remembered, counter=max(self._counter, self._remembered.counter)))

    def _remembered_id(self) -> UUID | None:
        with suppress(ValueError):
            return UUID(self._remembered.id) if self._remembered else None
        return None

    def _why_stale(self, lineage: Lineage) -> str:
        system, timeline, _ = lineage.server.split("/")
        known = self._remembered
        if not known or not system or not timeline or system != known.system or timeline >= known.timeline:
            return ""
        return (
            f"the server is on timeline {int(timeline, 16)}, and this host has worked with its timeline "
            f"{int(known.timeline, 16)}: connect to the server that was promoted; if this is the right one, delete "
            f"{self._path or 'the state'} and restart the daemon"
        )

    def _write(self, lineage: Lineage) -> None:
        if not lineage.stale:
            system, timeline, _ = lineage.server.split("/")
            self._save(_Memory(str(lineage.id), lineage.counter, system, timeline))

    def _save(self, memory: _Memory) -> None:
        self._remembered, self._written_at = memory, elapsed_seconds()
        if self._path is None:
            return
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        # A folder that can't be written to: renew-oauth, to which it matters, refuses to run and says so.
        with suppress(OSError), open(new, "w", encoding="utf-8", opener=_private) as file:
            file.write(json.dumps(vars(memory)))
            file.flush()
            os.fdatasync(file.fileno())  # or a power cut leaves an empty file under the name
            new.replace(self._path)


def _is_ours(folder: Path) -> bool:
    """Whether the folder is there and belongs to this user: root does nothing by path in another user's folder."""
    with suppress(OSError):
        return folder.stat().st_uid == os.geteuid()
    return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
