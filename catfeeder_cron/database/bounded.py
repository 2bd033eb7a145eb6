"""A connection that no server can hold up for ever, and that knows whether its server is gone or takes no writes."""

import os
import select
import socket
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from psycopg.pq.abc import PGconn

from catfeeder_cron.database.connecting import connect
from catfeeder_cron.database.resolving import Resolver

T = TypeVar("T")

_IN_RECOVERY, _READ_ONLY = b"in_hot_standby", b"default_transaction_read_only"

_STATE = "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only')"

# A look at a connection reads this often at most, so that a server which keeps sending does not hold it up.
_READS = 3


class NoAnswer(psycopg.OperationalError):
    """The server did not answer a statement in time. The connection is closed; the statement may be carried out yet."""


class TakesNoWrites(psycopg.OperationalError):
    """The server is a standby, or its default_transaction_read_only is on."""


class BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection in autocommit mode, which prepares no statement on the server. As psycopg's, one thread at a time
    uses it; `interrupt` may be called from any.

    Each wait for the server ends after `answer_within` seconds with NoAnswer; None sets no limit. At first that is the
    time that was given for connecting.
    """

    answer_within: float | None = None
    opened_at: float
    """When it was made, by the monotonic clock."""
    used_at: float
    """When it was given back to the pool last, or else when it was made, by the monotonic clock."""
    _tells_its_state: bool = False

    @classmethod
    def connect(  # type: ignore[override]  # psycopg_pool calls it with the arguments that Pool gives
        cls, conninfo: str, *, within_seconds: float, resolver: Resolver
    ) -> "BoundedConnection":
        """Connect to the first host that answers and takes writes, in so many seconds, resolver and all hosts included.

        Raises psycopg.OperationalError.
        """

        def accept(pgconn: PGconn, seconds_left: float) -> "BoundedConnection":
            connection = cls(pgconn)
            try:
                connection.answer_within = max(0.0, seconds_left)
                connection.autocommit = True
                connection.prepare_threshold = None
                connection._require_writes()
                connection.answer_within = within_seconds
                connection.opened_at = connection.used_at = time.monotonic()
            except BaseException:
                connection.close()
                raise
            return connection

        return connect(conninfo, within_seconds, resolver, accept)

    @property
    def said_read_only(self) -> bool:
        """Tell whether the server has said, with an answer, that it takes no writes. Asks nothing."""
        return self._tells_its_state and b"on" in self._reported()

    def why_no_writes(self) -> str:
        """Ask the server, outside of a transaction, whether it takes writes. Return why not; empty if it does.

        Raises psycopg.Error.
        """
        row = self.execute(_STATE).fetchone()
        in_recovery, read_only = row or (False, "off")
        if not in_recovery and read_only == "off":
            return ""
        why = "it is a standby" if in_recovery else "default_transaction_read_only is on"
        where = f'at "{self.info.host}", port {self.info.port}' if self.info.host else "of this address"
        return f"the server {where} takes no writes: {why}"

    def is_dead(self) -> bool:
        """Tell whether the other side has closed the connection. Takes no round trip."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        try:
            for _ in range(_READS):
                if not poll.poll(0):
                    return False
                self.pgconn.consume_input()  # TLS may have something to tell on a connection that is alive
        except psycopg.OperationalError:
            pass
        return True

    def may_be_forgotten(self, after_seconds: float) -> bool:
        """Tell whether the connection goes over a network, and was unused for so many seconds.

        A firewall or proxy on the way may then have forgotten it.
        """
        return time.monotonic() - self.used_at > after_seconds and not self.pgconn.host.startswith((b"/", b"@"))

    def interrupt(self) -> None:
        """Have every wait on this connection end, and the connection with it. Must not be called once it is closed."""
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:
        """Wait as psycopg does, for `answer_within` seconds at most."""
        if self.answer_within is not None:
            gen = self._in_time(gen, self.answer_within)
        result: T = super().wait(gen, *args, **options)
        return result

    def _in_time(self, gen: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
        # psycopg resumes the generator every tenth of a second, with or without news.
        until = time.monotonic() + seconds
        try:
            state = next(gen)
            while True:
                state = gen.send((yield state))
                if time.monotonic() >= until:
                    self.pgconn.finish()
                    raise NoAnswer(f"the server did not answer within {round(seconds, 1):g} s")
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _require_writes(self) -> None:
        """Raise TakesNoWrites for a read-only server.

        PostgreSQL reports its state with the connection. Behind a pooler the report may be missing, or another
        server's: then the server is asked.
        """
        reported = self._reported()
        self._tells_its_state = reported == (b"off", b"off")
        if not self._tells_its_state and (reason := self.why_no_writes()):
            raise TakesNoWrites(reason)

    def _reported(self) -> tuple[bytes | None, bytes | None]:
        return self.pgconn.parameter_status(_IN_RECOVERY), self.pgconn.parameter_status(_READ_ONLY)
