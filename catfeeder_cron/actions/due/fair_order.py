"""Read the due rows, in an order in which neither a kind of action nor a user starves the others."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from catfeeder_cron.actions.due.leases import may_begin_now
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.database import Connection
from catfeeder_cron.database.lineage import Lineage

# The most rows that are read at a time; the next reading brings the rows behind them.
_MOST = 50_000

# How many rows `take` passes over in search of a kind and a user that still have room.
_MOST_PASSED = 100

# From turn 1024 on, bands don't grow any more: the order within a kind stays roughly that of the due times.
_WIDEST_BAND = 10

# The kinds take turns, and within a kind its users do. So a user with a flood of actions gets one turn for each turn of
# another user.
_DUE = """
    SELECT id, kind, user_id, turn, early FROM (
        SELECT id, kind, user_id, row_number() OVER (PARTITION BY kind ORDER BY user_turn, due_at) AS turn,
               count(*) FILTER (WHERE {due} <= %(begun)s::timestamptz) OVER () AS early
        FROM (SELECT id, kind, user_id, due_at,
                     row_number() OVER (PARTITION BY kind, user_id ORDER BY due_at) AS user_turn
              FROM {actions} WHERE state = 'pending' AND {is_due} AND {may_begin}) AS by_user) AS by_kind
    ORDER BY turn LIMIT %(most)s"""


@dataclass(frozen=True)
class Candidate:
    """A due row that the run may try to claim."""

    id: Any
    kind: str
    user_id: Any


class FairOrder:
    """The rows that were due at one reading, in the order of their turns.

    Within a band of neighbouring turns the order is random, so that daemons that read the same rows don't all try to
    claim the same ones first. The first bands are narrow, because there a turn more or less matters.
    """

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self.early = rows[0][4] if rows else 0
        """How many of all due rows were due when the run began."""
        ordered = sorted(rows, key=lambda row: (_band(row[3]), random.random()), reverse=True)  # noqa: S311
        self._left = [Candidate(id, kind, user_id) for id, kind, user_id, _, _ in ordered]

    def __len__(self) -> int:
        return len(self._left)

    def take(self, number: int, busy: "Busy") -> list[Candidate]:
        """Take the next rows out, but leave those of kinds and users that have their share of the slots already."""
        taken: list[Candidate] = []
        passed: list[Candidate] = []
        while self._left and len(taken) < number and len(passed) < _MOST_PASSED:
            candidate = self._left.pop()
            if busy.has_room_for(candidate):
                busy.add(candidate)
                taken.append(candidate)
            else:
                passed.append(candidate)
        for candidate in taken:
            busy.remove(candidate)
        self._left.extend(reversed(passed))
        return taken


class Busy:
    """Counts how many of the run's slots each kind and each user has. None may have more than seven in eight."""

    def __init__(self, slots: int) -> None:
        self._most = max(1, slots - max(1, slots // 8))
        self._count: Counter[tuple[str, Any]] = Counter()

    def has_room_for(self, candidate: Candidate) -> bool:
        """Return whether the row's kind and user may have one more slot."""
        return all(self._count[share] < self._most for share in _shares(candidate))

    def add(self, candidate: Candidate) -> None:
        """Count a slot for the row's kind and user."""
        self._count.update(_shares(candidate))

    def remove(self, candidate: Candidate) -> None:
        """Free the slot of the row's kind and user."""
        self._count.subtract(_shares(candidate))


def due_in_fair_order(connection: Connection, tables: ActionTables, begun: str, lineage: Lineage | None) -> FairOrder:
    """Read the rows that may be claimed now; `begun` is when the run began, by the database's clock."""
    may_begin, more = may_begin_now(lineage)
    due = tables.statement(_DUE, may_begin=may_begin)
    return FairOrder(connection.execute(due, {"begun": begun, "most": _MOST} | more).fetchall())


def _shares(candidate: Candidate) -> list[tuple[str, Any]]:
    user = [] if candidate.user_id is None else [("user", candidate.user_id)]
    return [("kind", candidate.kind), *user]


def _band(turn: int) -> int:
    return min(_WIDEST_BAND, turn.bit_length() - 1) + (turn >> _WIDEST_BAND)
