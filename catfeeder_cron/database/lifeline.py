"""Statements that end in time whatever the network or the server does, for what must know that they did not."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, LiteralString

import psycopg
from psycopg import errors as pg

from catfeeder_cron import lifecycle
from catfeeder_cron.database.bounded import BoundedConnection, NoAnswer
from catfeeder_cron.database.errors import CLOSED, translated
from catfeeder_cron.database.outages import Outages
from catfeeder_cron.database.pool import Pool
from catfeeder_cron.errors import DatabaseUnavailable

_SERVER_GIVES_UP_LATER_MILLISECONDS = 500


class Lifeline:
    """A connection outside the pool, opened by the first statement and made anew after an error.

    Safe to use from any thread: one statement comes after the other. A forked process opens a connection of its own.
    """

    def __init__(
        self, pool: Pool, outages: Outages, deadline_seconds: float, forget: Callable[["Lifeline"], None]
    ) -> None:
        """`forget` is called when it is closed."""
        self._forget = forget
        self._pool = pool
        self._outages = outages
        self._deadline_seconds = deadline_seconds
        self._connection: BoundedConnection | None = None
        self._parents: list[BoundedConnection] = []  # a connection of the process that this one was forked from
        self._closed = False
        # Held by the thread that uses the connection, or closes it; who waits for it gives up at its own deadline.
        self._lock = threading.Lock()
        lifecycle.after_fork(self, Lifeline._after_fork)

    def query(self, statement: LiteralString, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run one statement as a transaction of its own, and return its rows. It may be carried out twice.

        Raises DatabaseUnavailable after `deadline_seconds` at the latest, connecting and the wait for other threads
        included; only the first start of an embedded server comes on top. The server may have carried the statement
        out then, or do so later. Raises another DatabaseError where the server refuses it.
        """
        until = time.monotonic() + self._deadline_seconds
        with self._outages.noticed(), translated():
            if not self._lock.acquire(timeout=self._deadline_seconds):
                raise DatabaseUnavailable(f"the statements before took longer than {self._deadline_seconds:g} s")
            try:
                rows = self._query(statement, parameters, until)
                is_kept = self._connection is not None
            finally:
                if self._closed:
                    self._drop()
                self._lock.release()
            if is_kept:
                self._outages.answered()
            return rows

    def close(self) -> None:
        """Close the connection, after the statement that is under way. Idempotent."""
        self._closed = True
        self._forget(self)
        if self._lock.acquire(timeout=self._deadline_seconds):  # otherwise the thread that holds it closes it
            try:
                self._drop()
            finally:
                self._lock.release()

    def _query(
        self, statement: LiteralString, parameters: Mapping[str, Any], until: float, *, again: bool = False
    ) -> list[tuple[Any, ...]]:
        connection = self._connected(until)
        connection.answer_within = _left(until)
        try:
            rows = _execute(connection, statement, parameters, self._deadline_seconds)
        except pg.ReadOnlySqlTransaction:
            if not (reason := self._why_no_writes(connection, until)):
                raise
        except (pg.QueryCanceled, pg.LockNotAvailable):
            raise DatabaseUnavailable(
                f"the server has not carried out a statement within {self._deadline_seconds:g} s"
            ) from None
        except psycopg.OperationalError as error:
            self._drop()
            if again or isinstance(error, NoAnswer):
                raise
            reason = str(error)  # the connection broke: while another can be had there is no outage
        else:
            if connection.said_read_only:
                # The answer stands: the statement may have been carried out just before.
                self._pool.replace_all(connection, sessions=True)
                self._drop()
            return rows
        if again:
            raise DatabaseUnavailable(reason)
        return self._query(statement, parameters, until, again=True)

    def _why_no_writes(self, connection: BoundedConnection, until: float) -> str:
        """Return why the server takes no writes, and have all connections made anew; empty if it takes them."""
        connection.answer_within = _left(until)
        reason = connection.why_no_writes()
        if reason:
            self._pool.replace_all(connection, sessions=True)
            self._drop()
        return reason

    def _connected(self, until: float) -> BoundedConnection:
        if self._closed:
            raise DatabaseUnavailable(CLOSED)
        connection = self._connection
        if connection is not None and (connection.is_dead() or self._pool.is_replaced(connection)):
            self._drop()
        if self._connection is None:
            self._connection = self._pool.connect(_left(until))
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _after_fork(self) -> None:
        """Leave the parent's connection to the parent; called in a process that was just forked from it."""
        self._lock = threading.Lock()  # a thread that exists in the parent alone may hold the copy for ever
        if self._connection is not None:
            self._parents.append(self._connection)
            self._connection = None


def _execute(
    connection: BoundedConnection, statement: LiteralString, parameters: Mapping[str, Any], seconds: float
) -> list[tuple[Any, ...]]:
    """Run a statement that the server gives up when its caller does: else each one leaves a backend that waits.

    All goes in one message, with the parameters in its text: only so do several statements take one round trip.
    """
    cursor = psycopg.ClientCursor(connection)
    limit = round(seconds * 1000) + _SERVER_GIVES_UP_LATER_MILLISECONDS
    limits = f"BEGIN; SET LOCAL statement_timeout = {limit}; SET LOCAL lock_timeout = {limit}; "
    try:
        cursor.execute(f"{limits}{cursor.mogrify(statement, parameters)}; COMMIT".encode())
    except psycopg.Error:
        if not connection.closed:
            connection.rollback()
        raise
    rows: list[tuple[Any, ...]] = []
    while True:
        if cursor.description is not None:
            rows = cursor.fetchall()
        if not cursor.nextset():
            return rows


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())
