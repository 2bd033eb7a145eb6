"""Delete expired rows of which some can't be: what is locked is passed over, what a constraint keeps is found."""

from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg import errors as pg
from psycopg import sql

from catfeeder_cron.database import Connection, identifier, single
from catfeeder_cron.expired_rows.leaf import MOST_NAMED, Kept, LeafDeletion

# Rows that are locked together while they are tried, and the wait for the rows that hang on one of them.
_ROWS = 200
_LOCK_TIMEOUT = "1ms"

# Told apart from a locked row, because it would have to be met for each of them: the table is locked as a whole.
_LOCK_TABLE = "LOCK TABLE ONLY {leaf} IN ROW EXCLUSIVE MODE"
# The order is that of the columns: bare names would mean the texts that are selected.
_LOCK = """
    SELECT ctid::text, {expiry}::timestamptz::text FROM ONLY {leaf} AS leaf WHERE {scope} {unreferenced}
    ORDER BY {order} LIMIT %(limit)s FOR UPDATE SKIP LOCKED"""
_DELETE = """
    DELETE FROM ONLY {leaf} AS leaf WHERE ctid = ANY (%(places)s::tid[]) AND {expiry} < %(cutoff)s::timestamptz"""
_NAME = "SELECT to_jsonb(leaf) ->> 'id' FROM ONLY {leaf} AS leaf WHERE ctid = %(place)s::tid"


@dataclass(frozen=True)
class Position:
    """How far a leaf was gone through: an expiry and a row's place, in the order of the one or the other."""

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
    """Delete what can be deleted of the next few rows of a scope; return how far that went, None at its end."""
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
    """Delete these locked rows; where one can't be deleted, find it by halves."""
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
