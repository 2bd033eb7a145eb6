"""Which rows are due, and in which order a run takes them on."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from catfeeder_cron.actions.due.leases import statement
from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Connection

# Rows of one survey at most; what is behind them comes with the next.
_MOST = 50_000

# How far a plan is looked through for somebody else's turn.
_MOST_PASSED = 100

# From 1024 on, bands don't grow any more: the order within a kind stays roughly that of the due times.
_WIDEST_BAND = 10

# Taking turns: the kinds among each other, and within a kind its users. A flood of one user's actions so gets one turn
# for each that another has.
_SURVEY = """
    SELECT id, kind, user_id, turn, early FROM (
        SELECT id, kind, user_id, row_number() OVER (PARTITION BY kind ORDER BY user_turn, due_at) AS turn,
               count(*) FILTER (WHERE due_at <= %(begun)s::timestamptz) OVER () AS early
        FROM (SELECT id, kind, user_id, due_at,
                     row_number() OVER (PARTITION BY kind, user_id ORDER BY due_at) AS user_turn
              FROM {actions} WHERE state = 'pending' AND due_at <= now()) AS by_user) AS by_kind
    ORDER BY turn LIMIT %(most)s"""


@dataclass(frozen=True)
class Candidate:
    id: Any
    kind: str
    user_id: Any


class Plan:
    """What is due as of one survey, in the order of turns.

    Within a band of neighbouring turns the order is random, so that daemons which look at the same rows don't all
    reach for the same ones. The first bands are narrow: there a turn more or less matters.
    """

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self.early = rows[0][4] if rows else 0
        """How many of all due rows were due when the run began."""
        ordered = sorted(rows, key=lambda row: (_band(row[3]), random.random()), reverse=True)  # noqa: S311
        self._left = [Candidate(id, kind, user_id) for id, kind, user_id, _, _ in ordered]

    def __len__(self) -> int:
        return len(self._left)

    def take(self, number: int, busy: "Busy") -> list[Candidate]:
        """Take the next ones out, passing over kinds and users that have their share of the slots already."""
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
    """Who has how many of the run's slots. One in eight is kept for those who don't have the others."""

    def __init__(self, slots: int) -> None:
        self._most = max(1, slots - max(1, slots // 8))
        self._count: Counter[tuple[str, Any]] = Counter()

    def has_room_for(self, candidate: Candidate) -> bool:
        return all(self._count[share] < self._most for share in _shares(candidate))

    def add(self, candidate: Candidate) -> None:
        self._count.update(_shares(candidate))

    def remove(self, candidate: Candidate) -> None:
        self._count.subtract(_shares(candidate))


def survey(connection: Connection, tables: DatabaseTables, begun: str) -> Plan:
    """Look at all that is due; `begun` is when the run began, by the database's clock."""
    parameters = {"begun": begun, "most": _MOST}
    return Plan(connection.execute(statement(_SURVEY, tables), parameters).fetchall())


def _shares(candidate: Candidate) -> list[tuple[str, Any]]:
    user = [] if candidate.user_id is None else [("user", candidate.user_id)]
    return [("kind", candidate.kind), *user]


def _band(turn: int) -> int:
    return min(_WIDEST_BAND, turn.bit_length() - 1) + (turn >> _WIDEST_BAND)
