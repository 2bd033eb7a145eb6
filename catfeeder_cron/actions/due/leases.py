"""Claim rows of "Actions", extend their leases while their handlers run, and take over the rows of dead processes.

A row is only claimed when its attempt starts at once, so every counted attempt was made. Every claim writes another
text into `lease_owner`, so a process that has lost its lease can't change the row any more.
"""

import json
import math
import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, LiteralString
from uuid import UUID, uuid4, uuid5

from psycopg import sql

from catfeeder_cron.actions.action import Action
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.database import Connection, single
from catfeeder_cron.times import elapsed_seconds

# The payload comes as text and the time within Python's limits, so that one unreadable row does not keep the others
# from being claimed. PostgreSQL checks the condition again after it has locked a row, so a row that another session has
# just claimed or cancelled is not claimed.
_CLAIM = """
    WITH picked AS MATERIALIZED (
        SELECT id FROM {actions} WHERE id = ANY(%(ids)s) AND state = 'pending' AND {is_due}
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

# `lapsed` are the rows whose lease is over, `logged` writes their lines in "ActionLog", `changed` makes them pending or
# failed, `forgotten` deletes the retries of the failed ones. The attempt was counted when it began. A row that is
# 'running' without a lease counts as lapsed, too.
_TAKE_OVER = """
    WITH lapsed AS MATERIALIZED (
        SELECT id, coalesce(attempts, 0) AS attempts, lease_owner,
               coalesce(attempts, 0) >= coalesce(max_attempts, 5) AS spent
        FROM {actions} WHERE {lapsed} LIMIT 1000 FOR UPDATE SKIP LOCKED),
    logged AS (
        INSERT INTO {action_log} (action_id, attempt, started_at, finished_at, outcome, detail)
        SELECT id, attempts,
               CASE WHEN lease_owner ~ %(owner_pattern)s THEN {started} END,
               {finished}, 'lost', %(reason)s
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

_OWNER_PATTERN = r" since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$"
LOST = "the process that ran it ended, or froze, before its lease was over"

_COUNT_DUE = "SELECT count(*) FROM {actions} WHERE (state = 'pending' AND {is_due}) OR ({lapsed})"

# least() ignores NULL. Both times are bounded, because now() can't be subtracted from an infinite time.
_DUE_IN = """
    SELECT extract(epoch FROM least(
        (SELECT min(greatest({due}, now() - interval '1 day')) FROM (
            SELECT due_at FROM {actions} WHERE state = 'pending' ORDER BY due_at LIMIT 1) AS next
         WHERE {due} < now() + interval '1 day'),
        (SELECT {lease} FROM (
            SELECT min(lease_until) AS lease_until FROM {actions} WHERE state = 'running') AS next)) - now())::float8"""

_ORIGIN = "SELECT origin FROM catfeeder_cron.action_origin"


@dataclass(frozen=True)
class Claimed:
    """An action under this run's lease, which lasts as long as `owner` is in its row."""

    action: Action
    owner: str
    lease_ends: float = math.inf
    """When the lease as claimed ends, by times.elapsed_seconds, at the earliest."""
    unreadable: str | None = None
    """Why its payload can't be handed to a handler."""


class Leases:
    """The leases of one run. Each method works inside the caller's transaction."""

    def __init__(self, tables: ActionTables, lease: timedelta) -> None:
        self._tables = tables
        self._lease = lease
        self._process = f"{platform.node()} {os.getpid()} {uuid4().hex[:8]}"
        self._origin: UUID | None = None

    def claim(self, connection: Connection, ids: list[Any], most: int) -> list[Claimed]:
        """Claim at most `most` of these rows, those that are still due, and count an attempt for each."""
        if self._origin is None:
            (self._origin,) = single(connection, _ORIGIN)
        parameters = {
            "ids": ids,
            "most": most,
            "lease": self._lease,
            "process": self._process,
            "longest": _LONGEST_PAYLOAD + 1,
        }
        lease_ends = elapsed_seconds() + self._lease.total_seconds()
        rows = connection.execute(self._sql(_CLAIM), parameters)
        return [self._claimed(row, self._origin, lease_ends) for row in rows]

    def extend(self, connection: Connection, held: list[Claimed]) -> tuple[set[Any], set[Any]]:
        """Extend these leases; return the rows that still have this run's lease, and those that were extended."""
        parameters = {
            "ids": [each.action.id for each in held],
            "owners": [each.owner for each in held],
            "lease": self._lease,
        }
        rows = connection.execute(self._sql(_EXTEND), parameters).fetchall()
        return {row[0] for row in rows}, {row[0] for row in rows if row[1]}

    def take_over(self, connection: Connection) -> list[Any]:
        """Make rows pending again whose lease ran out; return those that failed because it was their last attempt."""
        parameters = {"owner_pattern": _OWNER_PATTERN, "reason": LOST}
        return [id for (id,) in connection.execute(self._sql(_TAKE_OVER), parameters)]

    def _claimed(self, row: tuple[Any, ...], origin: UUID, lease_ends: float) -> Claimed:
        id, user_id, name, kind, text, attempt, owner, repeats, due_at = row
        key = str(uuid5(origin, f"{id}/{due_at.isoformat()}" if repeats else f"{id}"))
        payload, unreadable = _read(text)
        return Claimed(Action(id, user_id, name, kind, payload, due_at, attempt, key), owner, lease_ends, unreadable)

    def _sql(self, text: LiteralString) -> sql.Composed:
        return self._tables.statement(text)


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
    return int(single(connection, tables.statement(_COUNT_DUE))[0])


def due_in_seconds(connection: Connection, tables: ActionTables) -> float | None:
    """Return in how many seconds the next row is due or the next lease ends; None if neither is known."""
    (seconds,) = single(connection, tables.statement(_DUE_IN))
    return None if seconds is None else float(seconds)
