"""Claim rows of "Actions", keep them while their handlers run, and take over those of processes that died.

A claim is only made for what starts at once: an attempt that is counted has been made. `lease_owner` is another text
for every claim, so what a process does under a lease that it has lost meanwhile changes nothing.
"""

import json
import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, LiteralString
from uuid import UUID, uuid4, uuid5

from psycopg import sql

from catfeeder_cron.actions.action import Action
from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Connection, single

# The payload comes as text and the time within Python's limits: a row that can't be read must hold up no other.
# The condition is looked at again once a row is locked, so nobody claims what somebody has just claimed or cancelled.
_CLAIM = """
    WITH picked AS MATERIALIZED (
        SELECT id FROM {actions} WHERE id = ANY(%(ids)s) AND state = 'pending' AND due_at <= now()
        LIMIT %(most)s FOR UPDATE SKIP LOCKED)
    UPDATE {actions} AS a
    SET state = 'running', attempts = coalesce(a.attempts, 0) + 1, lease_until = now() + %(lease)s,
        lease_owner = %(process)s || ' since ' || to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
    FROM picked WHERE a.id = picked.id
    RETURNING a.id, a.user_id, a.name, a.kind, left(a.payload::text, %(longest)s), a.attempts, a.lease_owner,
        a.repeat_every IS NOT NULL,
        least(greatest(coalesce(
            (SELECT r.due_at FROM catfeeder_cron.action_retries r
             WHERE a.repeat_every IS NOT NULL AND r.action = a.id::text AND r.retry_at = a.due_at),
            a.due_at::timestamptz), '0001-01-02Z'), '9999-12-30Z')"""

# What somebody else has locked stays as it is: he can cancel it, and nobody can claim it meanwhile.
_EXTEND = """
    WITH ours AS (
        SELECT id FROM {actions} WHERE id = ANY(%(ids)s) AND lease_owner = ANY(%(owners)s) AND state = 'running'),
    locked AS MATERIALIZED (
        SELECT id FROM {actions}
        WHERE id = ANY(%(ids)s) AND lease_owner = ANY(%(owners)s) AND state = 'running' FOR UPDATE SKIP LOCKED),
    extended AS (
        UPDATE {actions} AS a SET lease_until = now() + %(lease)s FROM locked WHERE a.id = locked.id RETURNING a.id)
    SELECT ours.id, extended.id IS NOT NULL FROM ours LEFT JOIN extended USING (id)"""

_LONGEST_PAYLOAD = 1_000_000

_LAPSED = "state = 'running' AND (lease_until IS NULL OR lease_until < now())"

# The attempt was counted when it began. A row that says 'running' and is nobody's is treated alike.
_TAKE_OVER = """
    WITH lapsed AS MATERIALIZED (
        SELECT id, coalesce(attempts, 0) AS attempts, lease_owner,
               coalesce(attempts, 0) >= coalesce(max_attempts, 5) AS spent
        FROM {actions} WHERE {lapsed} LIMIT 1000 FOR UPDATE SKIP LOCKED),
    logged AS (
        INSERT INTO {action_log} (action_id, attempt, started_at, finished_at, outcome, detail)
        SELECT id, attempts,
               CASE WHEN lease_owner ~ %(owner_pattern)s THEN right(lease_owner, 27)::timestamptz END,
               now(), 'lost', %(reason)s
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

_COUNT_DUE = "SELECT count(*) FROM {actions} WHERE (state = 'pending' AND due_at <= now()) OR ({lapsed})"

# least() passes over NULL. Bounded on both sides, since an infinite time can't be subtracted from.
_DUE_IN = """
    SELECT extract(epoch FROM least(
        (SELECT min(greatest(due_at::timestamptz, now() - interval '1 day')) FROM (
            SELECT due_at FROM {actions} WHERE state = 'pending' ORDER BY due_at LIMIT 1) AS next
         WHERE due_at < now() + interval '1 day'),
        (SELECT min(lease_until)::timestamptz FROM {actions} WHERE state = 'running')) - now())::float8"""

_ORIGIN = "SELECT origin FROM catfeeder_cron.action_origin"


@dataclass(frozen=True)
class Claimed:
    """An action that is ours as long as `owner` is in its row."""

    action: Action
    owner: str
    unreadable: str | None = None
    """Why its payload can't be handed to a handler."""


class Leases:
    def __init__(self, tables: DatabaseTables, lease: timedelta) -> None:
        self._tables = tables
        self._lease = lease
        self._process = f"{platform.node()} {os.getpid()} {uuid4().hex[:8]}"
        self._origin: UUID | None = None

    def claim(self, connection: Connection, ids: list[Any], most: int) -> list[Claimed]:
        """Claim what is still due of these rows, `most` at most. An attempt is counted for each."""
        if self._origin is None:
            (self._origin,) = single(connection, _ORIGIN)
        parameters = {
            "ids": ids,
            "most": most,
            "lease": self._lease,
            "process": self._process,
            "longest": _LONGEST_PAYLOAD + 1,
        }
        return [self._claimed(row, self._origin) for row in connection.execute(self._sql(_CLAIM), parameters)]

    def extend(self, connection: Connection, held: list[Claimed]) -> tuple[set[Any], set[Any]]:
        """Extend these leases; return which rows are still ours, and which of them were extended."""
        parameters = {
            "ids": [each.action.id for each in held],
            "owners": [each.owner for each in held],
            "lease": self._lease,
        }
        rows = connection.execute(self._sql(_EXTEND), parameters).fetchall()
        return {row[0] for row in rows}, {row[0] for row in rows if row[1]}

    def take_over(self, connection: Connection) -> list[Any]:
        """Put rows whose lease ran out back to pending; return those that were given up after their last attempt."""
        parameters = {"owner_pattern": _OWNER_PATTERN, "reason": LOST}
        return [id for (id,) in connection.execute(self._sql(_TAKE_OVER), parameters)]

    def _claimed(self, row: tuple[Any, ...], origin: UUID) -> Claimed:
        id, user_id, name, kind, text, attempt, owner, repeats, due_at = row
        key = str(uuid5(origin, f"{id}/{due_at.isoformat()}" if repeats else f"{id}"))
        payload, unreadable = _read(text)
        return Claimed(Action(id, user_id, name, kind, payload, due_at, attempt, key), owner, unreadable)

    def _sql(self, text: LiteralString) -> sql.Composed:
        return statement(text, self._tables)


def _read(payload: str | None) -> tuple[Any, str | None]:
    """Return the payload, or why there is none: what PostgreSQL takes for JSON can be too much for Python."""
    if payload is not None and len(payload) > _LONGEST_PAYLOAD:
        return None, f"payload: longer than {_LONGEST_PAYLOAD} characters"
    try:
        return None if payload is None else json.loads(payload), None
    except (ValueError, RecursionError) as error:
        return None, f"payload: can't be read ({type(error).__name__})"


def count_due(connection: Connection, tables: DatabaseTables) -> int:
    """Count the rows that a run would take on now."""
    return int(single(connection, statement(_COUNT_DUE, tables))[0])


def due_in_seconds(connection: Connection, tables: DatabaseTables) -> float | None:
    """Return when the next row is due or its lease runs out, in seconds from now; None while nothing is in sight."""
    (seconds,) = single(connection, statement(_DUE_IN, tables))
    return None if seconds is None else float(seconds)


def statement(text: LiteralString, tables: DatabaseTables) -> sql.Composed:
    """Fill in the names of the tables."""
    return sql.SQL(text).format(
        actions=sql.Identifier(tables.schema_, tables.actions),
        action_log=sql.Identifier(tables.schema_, tables.action_log),
        lapsed=sql.SQL(_LAPSED),
    )
