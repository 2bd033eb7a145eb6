"""Delete a batch of expired rows of which some can't be deleted: skip locked rows, find those a constraint keeps."""

from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg import errors as pg
from psycopg import sql

from catfeeder_cron.database import Connection, identifier, single
from catfeeder_cron.expired_rows.leaf import MOST_NAMED, Kept, LeafDeletion

# How many rows are locked together while they are tried, and how long a DELETE waits for the rows that refer to them.
_ROWS = 200
_LOCK_TIMEOUT = "1ms"

# Fails at once when the whole table is locked; otherwise that would look like one locked row after the other.
_LOCK_TABLE = "LOCK TABLE ONLY {leaf} IN ROW EXCLUSIVE MODE"
# The order names the table's columns as leaf.X: bare names would mean the texts that are selected.
_LOCK = """
    SELECT ctid::text, {expiry}::{time}::text FROM ONLY {leaf} AS leaf WHERE {scope} {unreferenced}
    ORDER BY {order} LIMIT %(limit)s FOR UPDATE SKIP LOCKED"""
_DELETE = """
    DELETE FROM ONLY {leaf} AS leaf WHERE ctid = ANY (%(places)s::tid[]) AND {expiry} < %(cutoff)s::{time}"""
_NAME = "SELECT to_jsonb(leaf) ->> 'id' FROM ONLY {leaf} AS leaf WHERE ctid = %(place)s::tid"


@dataclass(frozen=True)
class Position:
    """The last row that was tried: its expiry, which counts in by_index, and its place, which counts in both ways."""

    expiry: str = "-infinity"
    place: str = "(0,0)"


def delete_next(
    deletion: LeafDeletion,
    scope: LiteralString,
    order: LiteralString,
    after: Position,
    parameters: dict[str, Any],
    planner: dict[str, str],
) -> Position | None:
    """Delete those of a scope's next few rows that can be deleted; return the last row's position, None at the end."""
    limit = min(deletion.room(), _ROWS)
    lock = deletion.statement(_LOCK, scope, order=sql.SQL(order).format(expiry=identifier(deletion.expiry)))
    values = deletion.parameters(limit=limit, expiry=after.expiry, place=after.place, **parameters)
    with deletion.batch(**planner) as connection:
        connection.execute(deletion.statement(_LOCK_TABLE), deletion.parameters())
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        rows = connection.execute(lock, values).fetchall()
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(_LOCK_TIMEOUT))
        deleted = _delete_or_halve(deletion, connection, [place for place, _ in rows]) if rows else 0
    deletion.deleted(deleted)
    return Position(expiry=rows[-1][1], place=rows[-1][0]) if len(rows) == limit else None


def _delete_or_halve(deletion: LeafDeletion, connection: Connection, places: list[str]) -> int:
    """Delete these rows, which are locked by us; if one can't be deleted, find it by halving the batch."""
    try:
        with connection.transaction():
            return connection.execute(deletion.statement(_DELETE), deletion.parameters(places=places)).rowcount
    except (pg.IntegrityError, pg.LockNotAvailable) as error:
        if len(places) == 1:
            if isinstance(error, pg.IntegrityError):
                _name(deletion, connection, places[0], error)
            return 0
    middle = len(places) // 2
    return sum(_delete_or_halve(deletion, connection, half) for half in (places[:middle], places[middle:]))


def _name(deletion: LeafDeletion, connection: Connection, place: str, error: pg.IntegrityError) -> None:
    constraint = error.diag.constraint_name or f"NOT NULL of {error.diag.table_name}.{error.diag.column_name}"
    kept = deletion.kept.setdefault(constraint, Kept())
    kept.rows += 1
    if len(kept.ids) < MOST_NAMED:
        kept.ids += single(connection, deletion.statement(_NAME), {"place": place})
