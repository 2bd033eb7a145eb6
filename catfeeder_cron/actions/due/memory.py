"""Remembers how attempts of this process ended, for a database that has lost their outcomes, or did not get them.

A server may lose its last seconds (see database/lineage.py), and hand out again what this process has done.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from uuid import UUID
from weakref import WeakKeyDictionary

from catfeeder_cron.actions.due.attempts import Finished
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.database import Database
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.times import elapsed_seconds

KEPT_SECONDS = 3600
_MOST = 10_000


@dataclass(frozen=True)
class Remembered:
    """How an attempt ended, and in which history of the database that was stored, or else the action was claimed."""

    finished: Finished
    lineage: UUID | None
    stored: bool
    looked_up_in: UUID | None = None
    """The history in which its row was looked up last."""

    def is_lost_in(self, lineage: UUID | None) -> bool:
        """Tell whether the database may not have this outcome: it never got it, or its history went back since."""
        return not self.stored or (None not in (self.lineage, lineage) and self.lineage != lineage)


class Memory:
    """The last attempts of this process on one database: of an hour, and not more than 10,000.

    Safe to use from any thread: several runs of this process may be under way.
    """

    def __init__(self) -> None:
        # Held by a thread that reads or changes the dictionary; nothing waits while it is held.
        self._lock = threading.Lock()
        self._by_key: OrderedDict[str, Remembered] = OrderedDict()

    def add(self, finished: Finished, lineage: UUID | None, *, stored: bool) -> None:
        """Remember how an attempt ended, instead of an earlier attempt of the same action and repetition."""
        claimed = finished.claimed
        if claimed.action.payload is not None:  # it may be large
            bare = replace(claimed, action=replace(claimed.action, payload=None))
            finished = replace(finished, claimed=bare)
        with self._lock:
            self._by_key.pop(claimed.action.key, None)
            self._by_key[claimed.action.key] = Remembered(finished, lineage, stored)
            while len(self._by_key) > _MOST:
                self._by_key.popitem(last=False)

    def done_before(self, claimed: Claimed) -> Remembered | None:
        """Return how an action ended that was handed out again because the database does not have its outcome."""
        with self._lock:
            self._forget_old()
            found = self._by_key.get(claimed.action.key)
        if found is None or not found.is_lost_in(claimed.lineage):
            return None
        before = found.finished
        is_final = before.verdict in ("done", "failed")
        return found if is_final or claimed.action.attempt <= before.claimed.action.attempt else None

    def to_look_up(self, lineage: Lineage | None) -> list[Remembered]:
        """Return the outcomes that the database may not have, and whose rows were not looked up in this history."""
        current = lineage.id if lineage else None
        with self._lock:
            self._forget_old()
            return [
                each
                for each in self._by_key.values()
                if each.is_lost_in(current) and (each.looked_up_in is None or each.looked_up_in != current)
            ]

    def looked_up(self, remembered: Remembered, lineage: Lineage | None) -> None:
        """Remember that the row was looked up: it may still be handed out later."""
        key = remembered.finished.claimed.action.key
        with self._lock:
            if self._by_key.get(key) is remembered:
                self._by_key[key] = replace(remembered, looked_up_in=lineage.id if lineage else None)

    def mark_stored(self, key: str, lineage: Lineage | None) -> None:
        """Remember that the database has the outcome in this history; it may lose it once more."""
        with self._lock:
            if found := self._by_key.get(key):
                self._by_key[key] = replace(found, lineage=lineage.id if lineage else None, stored=True)

    def _forget_old(self) -> None:
        old = elapsed_seconds() - KEPT_SECONDS
        while self._by_key and next(iter(self._by_key.values())).finished.at < old:
            self._by_key.popitem(last=False)


_memories: WeakKeyDictionary[Database, Memory] = WeakKeyDictionary()
# Held by a thread that looks for a memory: two runs that are the first on a database get one and the same.
_lock = threading.Lock()


def memory_of(database: Database) -> Memory:
    """Return what this process remembers of the actions in a database, as long as it keeps that open."""
    with _lock:
        return _memories.setdefault(database, Memory())
