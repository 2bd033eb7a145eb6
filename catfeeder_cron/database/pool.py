"""PostgreSQL: one pool for the process, short transactions, psycopg's errors translated.

Nothing here holds on to a session: every setting is made with SET LOCAL, no statement is prepared on the server
and no session-level lock is taken, so a transaction pooler such as PgBouncer may stand in between.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from types import TracebackType
from typing import Any, LiteralString, Self

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool, PoolTimeout

from catfeeder_cron import lifecycle
from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database.conninfo import with_defaults
from catfeeder_cron.database.errors import CLOSED, AllInUse, RollBack, translated
from catfeeder_cron.errors import (
    DatabaseError,
    DatabaseUnavailable,
)
from catfeeder_cron.imports import load
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.database")

Connection = psycopg.Connection[tuple[Any, ...]]

# How long one waits for a connection before looking whether there is an outage.
_LOOK_AT_OUTAGES_EVERY_SECONDS = 1.0

EMBEDDED = "embedded:"


class Database:
    """A pool of connections that is opened by its first use and closed for good with `close`. Safe to use from any
    thread; one that comes after `close` is answered with DatabaseUnavailable.

    With an `embedded:PATH` address the first use starts that private server, and `close` leaves it.

    A forked process has a pool of its own, opened by its first use there: the parent's connections stay the parent's.
    """

    def __init__(self, settings: DatabaseSettings, application_name: str = "catfeeder-cron") -> None:
        self._settings = settings
        self._application_name = application_name
        self._opened = ExitStack()
        self._pool: ConnectionPool[Connection] | None = None
        self._conninfo: str | None = None
        self._reachable = False  # as far as is known
        self._outage = False  # as far as was told
        self._trouble = ""
        self._closed = False
        self._lock = threading.RLock()
        lifecycle.after_fork(self, Database._after_fork)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def trouble(self) -> str:
        """Why the server could not be reached when it was last needed, in one line; empty where it could be."""
        return self._trouble

    @property
    def pool_use(self) -> dict[str, int]:
        """How many connections are `in_use` and `idle`, and how many requests are `waiting` for one."""
        with self._lock:
            stats = self._pool.get_stats() if self._pool else {}
        size, idle = stats.get("pool_size", 0), stats.get("pool_available", 0)
        return {"in_use": max(0, size - idle), "idle": idle, "waiting": stats.get("requests_waiting", 0)}

    @property
    def statement_timeout(self) -> timedelta:
        return self._settings.statement_timeout

    @contextmanager
    def transaction(self, *, timeout: timedelta | None = None, **local: str | int) -> Iterator[Connection]:
        """Yield a connection inside a READ COMMITTED transaction; commit on success, roll back on an exception.

        The session's time zone is UTC. A statement may take `timeout` (default: the configured
        `statement_timeout`). `local` are further settings for SET LOCAL. Raises a DatabaseError for whatever
        psycopg raises, and swallows RollBack.
        """
        limit = self.statement_timeout if timeout is None else timeout
        local = {"statement_timeout": _milliseconds(limit), "timezone": "UTC", "jit": "off", **local}
        with self._outage_told(), translated(), self._begun(_begin(local)) as connection:
            try:
                yield connection
            except BaseException as error:
                # One that fails must not hide why it was needed; the pool gives up such a connection.
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
                if isinstance(error, RollBack):
                    return
                raise
            if connection.execute("COMMIT").statusmessage == "ROLLBACK":
                raise DatabaseError("nothing was committed: a statement of the transaction had failed unnoticed")

    def query(self, statement: LiteralString, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run one statement as a transaction of its own, in one round trip, and return its rows.

        After DatabaseUnavailable it may have taken place or not.
        """
        with self._alone(statement, parameters) as cursor:
            return cursor.fetchall()

    def execute(self, statement: LiteralString, parameters: Mapping[str, Any]) -> int:
        """Do as `query`, but return how many rows were changed."""
        with self._alone(statement, parameters) as cursor:
            return cursor.rowcount

    @contextmanager
    def _alone(
        self, statement: LiteralString, parameters: Mapping[str, Any]
    ) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        with self._outage_told(), translated(), self._connection() as connection:
            try:
                cursor = connection.execute(statement, parameters)
            except psycopg.OperationalError:
                if connection.closed and self._pool is not None:
                    self._pool.check()  # the others in the pool are likely to be dead as well
                raise
            self._answered()
            yield cursor

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """Yield a connection of its own, outside the pool and outside any transaction (CREATE INDEX CONCURRENTLY)."""
        with translated(), psycopg.connect(self._address(), autocommit=True, prepare_threshold=None) as connection:
            yield connection

    def notifications(self, connection: Connection) -> list[str]:
        """Return the payloads of the notifications that have arrived at a session. Raises DatabaseUnavailable."""
        with translated():
            return [notification.payload for notification in connection.notifies(timeout=0)]

    def probe(self) -> None:
        """Connect once, without the pool, which would never say why it can't. Raises DatabaseUnavailable."""
        with self.session():
            pass

    def close(self) -> None:
        """Close every connection; leave the embedded server, if this object started one. Idempotent."""
        with self._lock:
            self._closed = True
            self._opened.close()

    def _after_fork(self) -> None:
        """Leave the parent's connections to the parent; called in a process that was just forked from it.

        The sockets are shared: whatever is written to one here, a farewell included, reaches the parent's server
        process. psycopg keeps to that when a connection is only dropped.
        """
        self._lock = threading.RLock()
        self._opened = ExitStack()
        if self._pool is not None:
            self._pool._closed = True  # noqa: SLF001 - its end would wait for threads that do not exist here
            self._pool = None
        if self._settings.conninfo.get_secret_value().startswith(EMBEDDED):
            self._conninfo = None  # the child joins that server itself

    @contextmanager
    def _outage_told(self) -> Iterator[None]:
        """Log an outage of the server when it is first met: once, however many meet it."""
        try:
            yield
        except AllInUse:
            raise
        except DatabaseUnavailable as error:
            if not self._closed:
                self._trouble = str(error)
                if self._is_news(outage=True):
                    log.error("database_unreachable", reason=str(error))
            raise

    def _answered(self) -> None:
        """Log the end of an outage, once."""
        self._trouble = ""
        if self._is_news(outage=False):
            log.info("database_reachable_again")

    def _is_news(self, *, outage: bool) -> bool:
        with self._lock:
            self._reachable = not outage
            before, self._outage = self._outage, outage
            return before != outage

    @contextmanager
    def _begun(self, begin: bytes) -> Iterator[Connection]:
        # BEGIN changes nothing, so it is also the test of a connection that a server restart may have killed in the
        # pool: a dead one is dropped and the next is tried, at most once through the whole pool.
        for attempt in range(self._settings.pool_max_size, -1, -1):
            with self._connection() as connection:
                try:
                    connection.execute(begin)
                except psycopg.OperationalError:
                    if attempt and connection.closed:
                        self._reachable = False
                        continue
                    raise
                self._answered()
                yield connection
                return

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        pool = self._open_pool()
        connection = self._get(pool)
        try:
            yield connection
        finally:
            pool.putconn(connection)

    def _get(self, pool: ConnectionPool[Connection]) -> Connection:
        """Wait for a connection, but not for one that can't come: an outage may be met by somebody else meanwhile."""
        until = time.monotonic() + pool.timeout
        while True:
            if not self._reachable:
                self.probe()  # fails at once where the pool would wait
            with suppress(PoolTimeout):
                return pool.getconn(max(0.0, min(_LOOK_AT_OUTAGES_EVERY_SECONDS, until - time.monotonic())))
            if time.monotonic() >= until:
                self.probe()
                raise AllInUse(
                    f"all {pool.max_size} database connections stayed in use for {pool.timeout:g} s; "
                    "raise database.pool_max_size"
                )

    def _open_pool(self) -> ConnectionPool[Connection]:
        with self._lock:
            address = self._address()
            if self._pool is None:
                wait = self._settings.connect_timeout.total_seconds()
                self._pool = self._opened.enter_context(
                    ConnectionPool(
                        address,
                        kwargs={"autocommit": True, "prepare_threshold": None},
                        min_size=0,
                        max_size=self._settings.pool_max_size,
                        timeout=wait,
                        # The pool tries one connection at a time and doubles its pauses: given up early, the
                        # next request for a connection tries at once when the server is back.
                        reconnect_timeout=wait,
                        num_workers=1,
                        open=False,
                    )
                )
            return self._pool

    def _address(self) -> str:
        with self._lock:
            if self._closed:
                raise DatabaseUnavailable(CLOSED)
            if self._conninfo is None:
                conninfo = self._settings.conninfo.get_secret_value()
                if self._settings.url_file_was_absent:
                    raise DatabaseUnavailable(
                        f"{self._settings.url_file} was missing or empty when the service was started: put the "
                        "database's URL into it, for root alone (mode 0600), and restart the service"
                    )
                if conninfo.startswith(EMBEDDED):
                    load("catfeeder_cron.database.embedded")
                    from catfeeder_cron.database import embedded

                    server = self._opened.enter_context(embedded.open(conninfo.removeprefix(EMBEDDED)))
                    conninfo = server.conninfo
                self._conninfo = with_defaults(conninfo, self._application_name, self._settings.connect_timeout)
            return self._conninfo


def _milliseconds(duration: timedelta) -> int:
    """At least 1: PostgreSQL takes 0 for "no limit"."""
    return max(1, round(duration.total_seconds() * 1000))


def _begin(local: dict[str, str | int]) -> bytes:
    """One message, one round trip. Composed by psycopg it would take a tenth of a small batch's time, so its parts are
    kept; numbers, of which each call has another, need no quoting.
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


def identifier(*names: str) -> sql.Identifier:
    """Return an identifier for a statement with parameters, where psycopg takes a % in it for a placeholder."""
    return sql.Identifier(*(name.replace("%", "%%") for name in names))


def single(connection: Connection, statement: LiteralString | sql.Composed, parameters: Any = None) -> tuple[Any, ...]:
    """Run a statement that always gives one row, and return it."""
    row: tuple[Any, ...] | None = connection.execute(statement, parameters).fetchone()
    assert row is not None, "the statement gave no row"
    return row
