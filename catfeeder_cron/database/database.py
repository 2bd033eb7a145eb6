"""Short transactions on the process's pool, with psycopg's errors translated.

Nothing here holds on to a session: every setting is made with SET LOCAL, no statement is prepared on the server
and no session-level lock is taken, so a transaction pooler such as PgBouncer may stand in between.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, LiteralString, Self

import psycopg
from psycopg import errors as pg

from catfeeder_cron.config.settings import DatabaseSettings
from catfeeder_cron.database import statements
from catfeeder_cron.database.bounded import BoundedConnection, NoAnswer
from catfeeder_cron.database.errors import RollBack, translated
from catfeeder_cron.database.lifeline import Lifeline
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.database.outages import Outages
from catfeeder_cron.database.pool import Pool
from catfeeder_cron.database.statements import Connection
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable


class Database:
    """Open a pool of connections at the first use, and close it for good with `close`. Safe to use from any thread.

    Every call after `close` raises DatabaseUnavailable. With an `embedded:PATH` address the first use starts that
    private server, and `close` leaves it. A forked process opens a pool of its own at its first use there: the parent's
    connections stay the parent's.
    """

    def __init__(self, settings: DatabaseSettings, application_name: str = "catfeeder-cron") -> None:
        self._settings = settings
        self._outages = Outages()
        self.lineage: Lineage | None = None
        """Which history of the database this process's last heartbeat met; None before the first."""
        self._pool = Pool(settings, application_name, self._outages)
        self._lifelines: set[Lifeline] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def trouble(self) -> str:
        """Return why the server could not be reached when it was last needed, in one line; empty if it was reached."""
        return self._outages.trouble

    @property
    def pool_use(self) -> dict[str, int]:
        """Return how many connections are `in_use` and `idle`, and how many requests are `waiting` for one."""
        return self._pool.use

    @property
    def naive_timestamps(self) -> str:
        """Return the zone in which the web server writes its columns without one."""
        return self._settings.naive_timestamps.key

    @contextmanager
    def transaction(self, *, timeout: timedelta | None = None, **local: str | int) -> Iterator[Connection]:
        """Yield a connection inside a READ COMMITTED transaction; commit on success, roll back on an exception.

        The session's time zone is UTC. A statement may take `timeout` (default: the configured
        `statement_timeout`). `local` are further settings for SET LOCAL. Raises a DatabaseError for whatever
        psycopg raises, and swallows RollBack.
        """
        limit = self._settings.statement_timeout if timeout is None else timeout
        settings = {"statement_timeout": statements.milliseconds(limit), "timezone": "UTC", "jit": "off", **local}
        with (
            self._outages.noticed(self._pool.probe),
            translated(),
            self._begun(statements.begin(settings)) as connection,
        ):
            connection.answer_within = self._pool.longest_answer_seconds(limit)
            try:
                yield connection
            except BaseException as error:
                # A ROLLBACK that fails must not hide the first error; the pool gives up such a connection.
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
                if isinstance(error, RollBack):
                    return
                if isinstance(error, pg.ReadOnlySqlTransaction) and "transaction_read_only" not in local:
                    self._require_writes(connection)
                raise
            if connection.execute("COMMIT").statusmessage == "ROLLBACK":
                raise DatabaseError("nothing was committed: a statement of the transaction had failed unnoticed")

    def query(self, statement: LiteralString, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run one statement as a transaction of its own, in one round trip, and return its rows.

        After DatabaseUnavailable the server may have carried the statement out or not.
        """
        with self._alone(statement, parameters) as cursor:
            return cursor.fetchall()

    def execute(self, statement: LiteralString, parameters: Mapping[str, Any]) -> int:
        """Run one statement as `query` does, but return how many rows were changed."""
        with self._alone(statement, parameters) as cursor:
            return cursor.rowcount

    @contextmanager
    def session(self, *, unbounded: bool = False) -> Iterator[Connection]:
        """Yield a new connection outside the pool and outside any transaction.

        A statement may take as long as in a transaction; with `unbounded` as long as it needs (CREATE INDEX
        CONCURRENTLY). The connection breaks when its server turns out to take no writes any more.
        """
        with self._pool.session(unbounded=unbounded) as connection:
            yield connection

    def lifeline(self, deadline_seconds: float) -> Lifeline:
        """Return a connection of its own for statements that end within so many seconds, whatever happens.

        `close` closes it.
        """
        lifeline = Lifeline(self._pool, self._outages, deadline_seconds, self._lifelines.discard)
        self._lifelines.add(lifeline)
        return lifeline

    def notifications(self, connection: Connection) -> list[str]:
        """Return the payloads of the notifications that have arrived at a session. Raises DatabaseUnavailable."""
        with translated():
            return [notification.payload for notification in connection.notifies(timeout=0)]

    def close(self) -> None:
        """Close every connection; leave the embedded server, if this object started one. Idempotent."""
        self._outages.close()  # first: a connection that breaks because the pool closes is no outage
        for lifeline in list(self._lifelines):
            lifeline.close()
        self._pool.close()

    @contextmanager
    def _alone(
        self, statement: LiteralString, parameters: Mapping[str, Any]
    ) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        with self._outages.noticed(self._pool.probe), translated():
            for last in (False, True):
                with self._pool.connection(test_idle=True) as connection:
                    connection.answer_within = self._pool.longest_answer_seconds(None)
                    try:
                        cursor = connection.execute(statement, parameters)
                    except pg.IdleSessionTimeout:
                        if last:
                            raise
                        continue  # the server had ended the session before the statement came
                    except pg.ReadOnlySqlTransaction:
                        self._require_writes(connection, once_more=not last)
                        if connection.closed:
                            continue
                        raise
                    except psycopg.OperationalError:
                        if connection.closed:
                            self._pool.replace_all(connection, sessions=False)  # the others are likely to be dead, too
                        raise
                    if connection.said_read_only:
                        # Its answer stands: it may have been carried out just before.
                        self._pool.replace_all(connection, sessions=True)
                    else:
                        self._outages.answered()
                    yield cursor
                    return

    @contextmanager
    def _begun(self, begin: bytes) -> Iterator[BoundedConnection]:
        # BEGIN changes nothing, so it is also the test of a connection that a server restart may have killed in the
        # pool: a dead one is dropped and the next is tried, at most once through the whole pool.
        for attempt in range(self._settings.pool_max_size, -1, -1):
            with self._pool.connection() as connection:
                try:
                    connection.execute(begin)
                except NoAnswer:
                    raise
                except psycopg.OperationalError:
                    if attempt and connection.closed:
                        self._outages.suspect()
                        continue
                    raise
                if connection.said_read_only:
                    connection.execute("ROLLBACK")
                    self._require_writes(connection, once_more=attempt > 0)
                    if connection.closed:
                        continue
                    connection.execute(begin)
                self._outages.answered()
                yield connection
                return

    def _require_writes(self, connection: BoundedConnection, *, once_more: bool = False) -> None:
        """Ask the server of a connection whether it takes writes; if it doesn't, have all connections made anew.

        Raises DatabaseUnavailable then; with `once_more` it closes the connection instead.
        """
        if reason := connection.why_no_writes():
            self._outages.suspect()
            self._pool.replace_all(connection, sessions=True)
            connection.close()
            if not once_more:
                raise DatabaseUnavailable(reason) from None
