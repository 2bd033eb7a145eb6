"""Compose statements, and run those that give one row."""

from datetime import timedelta
from functools import lru_cache
from typing import Any, LiteralString

import psycopg
from psycopg import sql

Connection = psycopg.Connection[tuple[Any, ...]]


def identifier(*names: str) -> sql.Identifier:
    """Return an identifier for a statement with parameters, where psycopg takes a % in it for a placeholder."""
    return sql.Identifier(*(name.replace("%", "%%") for name in names))


def single(connection: Connection, statement: LiteralString | sql.Composed, parameters: Any = None) -> tuple[Any, ...]:
    """Run a statement that always gives one row, and return it."""
    row: tuple[Any, ...] | None = connection.execute(statement, parameters).fetchone()
    assert row is not None, "the statement gave no row"
    return row


def milliseconds(duration: timedelta) -> int:
    """Return a timeout for PostgreSQL; at least 1, because PostgreSQL takes 0 for "no limit"."""
    return max(1, round(duration.total_seconds() * 1000))


def begin(local: dict[str, str | int]) -> bytes:
    """Return the statements that begin a READ COMMITTED transaction with these settings, as one message.

    One message takes one round trip. Composing it with psycopg would take a tenth of a small batch's time, so its parts
    are cached; numbers differ from call to call, and need no quoting.
    """
    settings = (
        _set_local(name) + (b"%d" % value if isinstance(value, int) else _literal(value))
        for name, value in local.items()
    )
    return b"; ".join((b"BEGIN ISOLATION LEVEL READ COMMITTED", *settings))


@lru_cache
def _set_local(name: str) -> bytes:
    return sql.SQL("SET LOCAL {} = ").format(sql.Identifier(name)).as_bytes()


@lru_cache
def _literal(value: str) -> bytes:
    return sql.Literal(value).as_bytes()
