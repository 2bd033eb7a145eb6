"""Connections to the server: the address, the embedded server behind it, the pool, and waiting for a connection."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from catfeeder_cron import lifecycle
from catfeeder_cron.config.settings import DatabaseSettings
from catfeeder_cron.database.bounded import BoundedConnection, NoAnswer
from catfeeder_cron.database.conninfo import connect_seconds, password_replaced, with_defaults
from catfeeder_cron.database.errors import CLOSED, AllInUse, translated
from catfeeder_cron.database.outages import Outages
from catfeeder_cron.database.resolving import Resolver
from catfeeder_cron.errors import DatabaseUnavailable
from catfeeder_cron.imports import load

# A thread that waits for a connection looks this often whether another thread has met an outage.
_LOOK_AT_OUTAGES_EVERY_SECONDS = 1.0

# A firewall or proxy that has forgotten a connection says so only when something is sent. Shorter pauses are no reason
# for a round trip: PostgreSQL and TCP's keepalives close a connection such that it can be seen.
_TEST_AFTER_SECONDS = 30.0

EMBEDDED = "embedded:"


class Pool:
    """Open the pool, and the embedded server before it, at the first use. Safe to use from any thread.

    A forked process opens a pool of its own at its first use there; the parent's connections stay the parent's.
    """

    def __init__(self, settings: DatabaseSettings, application_name: str, outages: Outages) -> None:
        self._settings = settings
        self._application_name = application_name
        self._outages = outages
        self._opened = ExitStack()
        self._pool: ConnectionPool[BoundedConnection] | None = None
        self._given = settings.conninfo.get_secret_value()
        self._conninfo: str | None = None
        self._connect_seconds = settings.connect_timeout.total_seconds()
        self._resolver = Resolver()
        self._sessions: set[BoundedConnection] = set()
        self._replaced_at = float("-inf")
        self._closed = False
        # Held by a thread that opens or closes the server and the pool, so that others wait for them and none opens a
        # second one; never while waiting for a connection. An RLock, because `_open` holds it when it calls `_address`.
        self._lock = threading.RLock()
        lifecycle.after_fork(self, Pool._after_fork)

    @property
    def use(self) -> dict[str, int]:
        """Return how many connections are `in_use` and `idle`, and how many requests are `waiting` for one."""
        with self._lock:
            stats = self._pool.get_stats() if self._pool else {}
        size, idle = stats.get("pool_size", 0), stats.get("pool_available", 0)
        return {"in_use": max(0, size - idle), "idle": idle, "waiting": stats.get("requests_waiting", 0)}

    @contextmanager
    def connection(self, *, test_idle: bool = False) -> Iterator[BoundedConnection]:
        """Lend a connection of the pool for the `with` block. Raises DatabaseUnavailable, or AllInUse after a wait.

        One that the other side has closed is replaced. With `test_idle` one that was unused for long also has to answer
        first; leave that out if the first statement may be sent twice.
        """
        pool = self._open()
        connection = self._get_alive(pool, test_idle=test_idle)
        try:
            yield connection
        finally:
            connection.used_at = time.monotonic()
            pool.putconn(connection)

    @contextmanager
    def session(self, *, unbounded: bool = False) -> Iterator[BoundedConnection]:
        """Yield a new connection outside the pool, without a transaction. Raises DatabaseUnavailable.

        With `unbounded` a statement may take for ever.
        """
        with translated():
            connection = self.connect()
            connection.answer_within = None if unbounded else self.longest_answer_seconds(None)
            with self._lock:
                self._sessions.add(connection)
            try:
                yield connection
            finally:
                with self._lock:
                    self._sessions.discard(connection)
                connection.close()

    def connect(self, within_seconds: float | None = None) -> BoundedConnection:
        """Return a new connection outside the pool, made in so many seconds (default: the address's connect_timeout).

        Raises psycopg.OperationalError, or DatabaseUnavailable after `close`. An embedded server is started first,
        which takes longer.
        """
        address = self._address()
        seconds = self._connect_seconds if within_seconds is None else within_seconds
        return BoundedConnection.connect(address, within_seconds=seconds, resolver=self._resolver)

    def longest_answer_seconds(self, timeout: timedelta | None) -> float:
        """Return how long to wait for the answer to a statement that the server ends after `timeout`.

        A server that has not ended it when as much time as for connecting has passed, too, can't be reached.
        """
        limit = self._settings.statement_timeout if timeout is None else timeout
        return limit.total_seconds() + self._connect_seconds

    def probe(self, within_seconds: float | None = None) -> None:
        """Connect once outside the pool, which would never say why it can't. Raises DatabaseUnavailable."""
        with translated():
            self.connect(within_seconds).close()

    def replace_all(self, met: BoundedConnection, *, sessions: bool) -> None:
        """Have every connection made anew that is as old as `met`; those in use when they are given back.

        With `sessions`, those outside the pool are interrupted: their server takes no writes any more.
        """
        with self._lock:
            if self.is_replaced(met) or self._closed:
                return  # another connection has met it before
            self._replaced_at = time.monotonic()
            if self._pool is not None:
                self._pool.drain()
            for session in self._sessions if sessions else ():
                session.interrupt()

    def is_replaced(self, connection: BoundedConnection) -> bool:
        """Tell whether a connection is as old as those that `replace_all` has replaced."""
        return connection.opened_at <= self._replaced_at

    def close(self) -> None:
        """Close every connection; leave the embedded server, if this object started one. Idempotent."""
        with self._lock:
            self._closed = True
            opened = self._opened.pop_all()
        opened.close()  # without the lock: the pool's own thread may need it to end

    def _after_fork(self) -> None:
        """Leave the parent's connections to the parent; called in a process that was just forked from it.

        The sockets are shared: whatever this process writes to one, a farewell included, reaches the parent's server
        process. psycopg writes nothing when a connection is only dropped.
        """
        self._lock = threading.RLock()  # a thread that exists in the parent alone may hold the copy for ever
        self._opened = ExitStack()
        self._resolver = Resolver()
        self._sessions = set()
        if self._pool is not None:
            self._pool._closed = True  # noqa: SLF001 - its end would wait for threads that do not exist here
            self._pool = None
        if self._given.startswith(EMBEDDED):
            self._conninfo = None  # the child joins that server itself

    def _get_alive(self, pool: ConnectionPool[BoundedConnection], *, test_idle: bool) -> BoundedConnection:
        for _ in range(pool.max_size + 1):
            connection = self._get(pool)
            connection.answer_within = self._connect_seconds
            try:
                if not connection.is_dead():
                    if test_idle and connection.may_be_forgotten(_TEST_AFTER_SECONDS):
                        connection.execute("")
                    return connection
            except NoAnswer:
                pool.putconn(connection)
                raise
            except psycopg.Error:
                pass
            except BaseException:
                pool.putconn(connection)
                raise
            self._outages.suspect()
            connection.close()
            pool.putconn(connection)  # it makes a new one in its place
        raise DatabaseUnavailable("no connection to the database: the other side closes each one at once")

    def _get(self, pool: ConnectionPool[BoundedConnection]) -> BoundedConnection:
        """Wait for a connection, but stop waiting when another thread meets an outage: then none will come."""
        until = time.monotonic() + pool.timeout
        while True:
            if not self._outages.reachable:
                self.probe()  # fails at once where the pool would wait
                self._outages.answered()
            with suppress(PoolTimeout):
                return pool.getconn(max(0.0, min(_LOOK_AT_OUTAGES_EVERY_SECONDS, until - time.monotonic())))
            if time.monotonic() >= until:
                # The pool has tried for as long as is allowed, so this is only about the reason.
                self.probe(max(2.0, self._connect_seconds / 4))
                raise AllInUse(
                    f"all {pool.max_size} database connections stayed in use for {pool.timeout:g} s; "
                    "raise database.pool_max_size"
                )

    def _open(self) -> ConnectionPool[BoundedConnection]:
        with self._lock:
            if self._pool is None or self._closed:
                self._address()  # raises what the pool's thread would only log
                wait = self._settings.connect_timeout.total_seconds()
                self._pool = self._opened.enter_context(
                    ConnectionPool(
                        self._address,
                        connection_class=BoundedConnection,
                        kwargs={"within_seconds": self._connect_seconds, "resolver": self._resolver},
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
        """Return the address to connect to, after starting or joining the embedded server if it names one.

        Its password is the one that its file has now.
        """
        with self._lock:
            if self._closed:
                raise DatabaseUnavailable(CLOSED)
            if self._settings.url_file_was_absent:
                raise DatabaseUnavailable(
                    f"{self._settings.url_file} was missing or empty when the service was started: put the "
                    "database's URL into it, for root alone (mode 0600), and restart the service"
                )
            given = self._given
            if given.startswith(EMBEDDED):
                if self._conninfo is None:
                    load("catfeeder_cron.database.embedded")
                    from catfeeder_cron.database import embedded

                    server = self._opened.enter_context(embedded.open(given.removeprefix(EMBEDDED)))
                    self._complete(server.conninfo)
            else:
                self._given = password_replaced(given, self._settings.conninfo_now())
                if self._conninfo is None or self._given != given:
                    self._complete(self._given)
            assert self._conninfo is not None, "it was completed"
            return self._conninfo

    def _complete(self, conninfo: str) -> None:
        self._conninfo = with_defaults(conninfo, self._application_name, self._settings.connect_timeout)
        self._connect_seconds = connect_seconds(self._conninfo)
