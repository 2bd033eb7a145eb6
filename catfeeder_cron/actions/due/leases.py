"""Claim rows of "Actions", extend their leases while their handlers run, and take over the rows of dead processes.

A row is only claimed when its attempt starts at once, so every counted attempt was made. Every claim writes another
text into `lease_owner`, so a process that has lost its lease can't change the row any more.
"""

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, LiteralString
from uuid import UUID, uuid4, uuid5

import psycopg

from catfeeder_cron.actions.action import Action
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.database import Connection, single
from catfeeder_cron.database.lineage import IS_CURRENT, Lineage
from catfeeder_cron.times import elapsed_seconds

# The payload comes as text and the time within Python's limits, so that one unreadable row does not keep the others
# from being claimed. PostgreSQL checks the condition again after it has locked a row, so a row that another session has
# just claimed or cancelled is not claimed. The lease begins at clock_timestamp(), which is after this process has read
# its own clock; now() is when the transaction began, which may be long before.
_CLAIM = """
    WITH picked AS MATERIALIZED (
        SELECT id FROM {actions} WHERE id = ANY(%(ids)s) AND state = 'pending' AND {is_due} AND {may_begin}
        LIMIT %(most)s FOR UPDATE SKIP LOCKED)
    UPDATE {actions} AS a
    SET state = 'running', attempts = coalesce(a.attempts, 0) + 1, lease_until = {lease_ends},
        lease_owner = %(process)s || ' since ' || to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
    FROM picked WHERE a.id = picked.id
    RETURNING a.id, a.user_id, a.name, a.kind, left(a.payload::text, %(longest)s), a.attempts, a.lease_owner,
        a.repeat_every IS NOT NULL,
        least(greatest(coalesce(
            (SELECT r.due_at FROM catfeeder_cron.action_retries r
             WHERE a.repeat_every IS NOT NULL AND r.action = a.id::text AND {retry_shown} = a.due_at),
            {due_of_a}), '0001-01-02Z'), '9999-12-30Z')"""

# `ours` are the rows that still have our lease, `locked` those of them that no other session has locked, `extended`
# gets the new lease. A locked row is left: its session may be cancelling it, and no daemon can claim it meanwhile.
_EXTEND = """
    WITH ours AS (
        SELECT id FROM {actions} WHERE id = ANY(%(ids)s) AND lease_owner = ANY(%(owners)s) AND state = 'running'),
    locked AS MATERIALIZED (
        SELECT id FROM {actions}
        WHERE id = ANY(%(ids)s) AND lease_owner = ANY(%(owners)s) AND state = 'running' FOR UPDATE SKIP LOCKED),
    extended AS (
        UPDATE {actions} AS a SET lease_until = {lease_ends} FROM locked WHERE a.id = locked.id RETURNING a.id)
    SELECT ours.id, extended.id IS NOT NULL FROM ours LEFT JOIN extended USING (id)"""

_LONGEST_PAYLOAD = 1_000_000

# A server that lost its last seconds hands out what was done already. Until a heartbeat has noticed it hands out
# nothing. Then each process has 27 s for a heartbeat of its own: it stores what it remembers (see put_back), and ends
# what it has begun. One that is cut off ends its handlers 25 s after its last heartbeat, a webhook ends after 20 s.
_WENT_BACK: LiteralString = """
    SELECT since FROM catfeeder_cron.lineage
    WHERE reason IS NOT NULL AND since BETWEEN now() - interval '27 s' AND now() + interval '5 s'"""
_NOT_DONE_BEFORE: LiteralString = f"coalesce({{due}} > ({_WENT_BACK}), true)"
_MAY_BEGIN: LiteralString = f"{IS_CURRENT} AND {_NOT_DONE_BEFORE}"

_LAPSED: LiteralString = "state = 'running' AND (lease_until IS NULL OR {lease_is_over})"

# A lease that ends too late for one that was claimed or extended now, and was claimed in the future: a clock of the
# database's that was ahead has left it.
_LAPSED_OR_IN_THE_FUTURE: LiteralString = """
    state = 'running' AND (lease_until IS NULL OR {lease_is_over} OR {lease_at_earliest} > now() + 2 * %(lease)s
        AND CASE WHEN lease_owner ~ %(owner_pattern)s THEN right(lease_owner, 27)::timestamptz END
            > now() + interval '5 s')"""

# After an outage, or when the database's clock was set, all leases have lapsed at once. Those that hold them extend
# them every 20 s, and store their outcomes as soon as they can: they have 30 s for that.
_ALL_HAD_TIME: LiteralString = """
    EXISTS (SELECT FROM catfeeder_cron.lineage
            WHERE written_at BETWEEN now() - interval '15 s' AND now() + interval '5 s'
              AND heard_since < now() - interval '30 s')"""

# `lapsed` are the rows whose lease is over, `logged` writes their lines in "ActionLog", `changed` makes them pending or
# failed, `forgotten` deletes the retries of the failed ones. The attempt was counted when it began. A row that is
# 'running' without a lease counts as lapsed, too. `ours` are attempts whose outcome this process has yet to store.
_TAKE_OVER = """
    WITH lapsed AS MATERIALIZED (
        SELECT id, coalesce(attempts, 0) AS attempts, lease_owner,
               coalesce(attempts, 0) >= coalesce(max_attempts, 5) AS spent
        FROM {actions} WHERE {lapsed} AND (lease_owner = ANY(%(ours)s)) IS NOT TRUE AND {all_had_time}
        LIMIT 1000 FOR UPDATE SKIP LOCKED),
    logged AS (
        INSERT INTO {action_log} (action_id, attempt, started_at, finished_at, outcome, detail)
        SELECT id, attempts,
               CASE WHEN lease_owner ~ %(owner_pattern)s THEN {owner_started} END,
               {finished_now}, 'lost', %(reason)s
        FROM lapsed),
    changed AS (
        UPDATE {actions} AS a
        SET state = CASE WHEN spent THEN 'failed' ELSE 'pending' END,
            lease_owner = NULL, lease_until = NULL, last_error = %(reason)s
        FROM lapsed WHERE a.id = lapsed.id
        RETURNING a.id, lapsed.spent),
    forgotten AS (
        DELETE FROM catfeeder_cron.action_retries r USING changed WHERE r.action = changed.id::text AND changed.spent)
    SELECT id FROM changed WHERE spent"""

# Whether there is something to take over as soon as all have had time.
_LAPSED_TOO_SHORT_AGO = """
    SELECT EXISTS (SELECT FROM {actions} WHERE {lapsed} AND (lease_owner = ANY(%(ours)s)) IS NOT TRUE)
           AND NOT {all_had_time}"""

OWNER_PATTERN = r" since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$"
LOST = "the process that ran it ended, or froze, before its lease was over"

_COUNT_DUE = "SELECT count(*) FROM {actions} WHERE (state = 'pending' AND {is_due}) OR ({lapsed})"

# least() and greatest() ignore NULL. The times are bounded, because now() can't be subtracted from an infinite time.
_DUE_IN = """
    WITH went_back AS ({went_back})
    SELECT extract(epoch FROM least(
        (SELECT min(greatest({due}, now() - interval '1 day', (SELECT since + interval '27 s' FROM went_back))) FROM (
            SELECT due_at FROM {actions} WHERE state = 'pending' ORDER BY due_at LIMIT 1) AS next
         WHERE {due} < now() + interval '1 day'),
        (SELECT {due} FROM went_back, LATERAL (
            SELECT due_at FROM {actions} WHERE state = 'pending' AND {due_after_since} ORDER BY due_at LIMIT 1) AS next
         WHERE {due} < now() + interval '1 day'),
        (SELECT {lease} FROM (
            SELECT min(lease_until) AS lease_until FROM {actions} WHERE state = 'running') AS next)) - now())::float8"""

_ORIGIN = "SELECT origin FROM catfeeder_cron.action_origin"


@dataclass(frozen=True)
class Claimed:
    """An action under this run's lease, which lasts as long as `owner` is in its row."""

    action: Action
    owner: str
    lineage: UUID | None = None
    """The history of the database that it was claimed in, as far as that is known."""
    lease_ends: float = math.inf
    """When the lease as claimed ends, by times.elapsed_seconds, at the earliest."""
    unreadable: str | None = None
    """Why its payload can't be handed to a handler."""


class Leases:
    """The leases of one run. Each method works inside the caller's transaction.

    `lineage` returns what this process knows of the database's history; None before its first heartbeat, and then no
    statement asks for it.
    """

    def __init__(self, tables: ActionTables, lease: timedelta, lineage: Callable[[], Lineage | None]) -> None:
        self._tables = tables
        self._lineage = lineage
        self._lease = lease
        self._process = f"{platform.node()} {os.getpid()} {uuid4().hex[:8]}"
        self._origin: UUID | None = None

    def claim(self, connection: Connection, ids: list[Any], most: int, *, done_before: bool = False) -> list[Claimed]:
        """Claim at most `most` of these rows, those that are still due, and count an attempt for each.

        Rows that another process may have done before the database lost its last seconds are left for a while, unless
        it is known that this process has `done` them `before`.
        """
        if self._origin is None:
            (self._origin,) = single(connection, _ORIGIN)
        parameters = {
            "ids": ids,
            "most": most,
            "lease": self._lease,
            "process": self._process,
            "longest": _LONGEST_PAYLOAD + 1,
        }
        lineage = self._lineage()
        lease_ends = elapsed_seconds() + self._lease.total_seconds()
        may_begin, more = may_begin_now(lineage, done_before=done_before)
        rows = connection.execute(self._tables.statement(_CLAIM, may_begin=may_begin), parameters | more)
        return [self._claimed(row, self._origin, lineage.id if lineage else None, lease_ends) for row in rows]

    def extend(self, connection: Connection, held: list[Claimed]) -> tuple[set[Any], set[Any]]:
        """Extend these leases; return the rows that still have this run's lease, and those that were extended."""
        parameters = {
            "ids": [each.action.id for each in held],
            "owners": [each.owner for each in held],
            "lease": self._lease,
        }
        rows = connection.execute(self._tables.statement(_EXTEND), parameters).fetchall()
        return {row[0] for row in rows}, {row[0] for row in rows if row[1]}

    def take_over(self, connection: Connection, held: list[Claimed]) -> list[Any]:
        """Make rows pending again whose lease ran out; return those that failed because it was their last attempt.

        The rows in `held` stay as they are.
        """
        return [id for (id,) in self._of_lapsed(connection, _TAKE_OVER, held)]

    def lapsed_too_short_ago(self, connection: Connection, held: list[Claimed]) -> bool:
        """Return whether there are rows that `take_over` leaves for now, because their owners may come back."""
        ((found,),) = self._of_lapsed(connection, _LAPSED_TOO_SHORT_AGO, held)
        return bool(found)

    def _of_lapsed(
        self, connection: Connection, text: LiteralString, held: list[Claimed]
    ) -> "psycopg.Cursor[tuple[Any, ...]]":
        parameters = {"owner_pattern": OWNER_PATTERN, "reason": LOST, "lease": self._lease}
        known = self._lineage() is not None
        lapsed = self._tables.statement(
            text,
            lapsed=_LAPSED_OR_IN_THE_FUTURE if known else _LAPSED,
            all_had_time=_ALL_HAD_TIME if known else "true",
        )
        return connection.execute(lapsed, parameters | {"ours": [each.owner for each in held]})

    def _claimed(self, row: tuple[Any, ...], origin: UUID, lineage: UUID | None, lease_ends: float) -> Claimed:
        id, user_id, name, kind, text, attempt, owner, repeats, due_at = row
        key = str(uuid5(origin, f"{id}/{due_at.isoformat()}" if repeats else f"{id}"))
        payload, unreadable = _read(text)
        action = Action(id, user_id, name, kind, payload, due_at, attempt, key)
        return Claimed(action, owner, lineage, lease_ends, unreadable)


def _read(payload: str | None) -> tuple[Any, str | None]:
    """Return the payload, or why it can't be read: Python refuses some JSON that PostgreSQL accepts."""
    if payload is not None and len(payload) > _LONGEST_PAYLOAD:
        return None, f"payload: longer than {_LONGEST_PAYLOAD} characters"
    try:
        return None if payload is None else json.loads(payload), None
    except (ValueError, RecursionError) as error:
        return None, f"payload: can't be read ({type(error).__name__})"


def count_due(connection: Connection, tables: ActionTables) -> int:
    """Count the rows that a run would claim now."""
    return int(single(connection, tables.statement(_COUNT_DUE, lapsed=_LAPSED))[0])


def due_in_seconds(connection: Connection, tables: ActionTables) -> float | None:
    """Return in how many seconds the next row is due or the next lease ends; None if neither is known."""
    (seconds,) = single(connection, tables.statement(_DUE_IN, went_back=_WENT_BACK))
    return None if seconds is None else float(seconds)


def may_begin_now(lineage: Lineage | None, *, done_before: bool = False) -> tuple[LiteralString, dict[str, Any]]:
    """Return the condition on a row that no other process has done it, as far as can be known, with its parameters."""
    if lineage is None:
        return "true", {}
    return IS_CURRENT if done_before else _MAY_BEGIN, lineage.parameters()
