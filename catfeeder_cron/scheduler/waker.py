"""Runs a job as soon as there is something to do for it, without waiting for its next slot.

A waker looks when PostgreSQL sends a notification, and when the next known row is due. LISTEN needs a session to
itself, so the waker has a connection beside the pool. Without such a connection, and behind a transaction pooler, which
passes no notification on, the waker looks every 30 seconds.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from psycopg import sql

from catfeeder_cron.database import Connection, Database
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.waker")

# How long a change without a notification may stay unseen: an UPDATE; and, without notifications, any change.
_POLL_LISTENING_SECONDS = 60.0
_POLL_SECONDS = 30.0
# Between two runs. It doubles while due rows stay undone: the job is paused or runs elsewhere, or they are locked.
_SHORTEST_PAUSE_SECONDS = 0.5
_RECONNECT_SECONDS = 5.0
# A trial takes up to _ECHO_SECONDS, in which the waker does not look for due rows.
_LISTEN_AGAIN_SECONDS = 300.0
_CLOSE_SECONDS = 3.0
# How long a notification may take that the waker sends to itself.
_ECHO_SECONDS = 5.0
# Between two sessions, where servers or proxies end them at once.
_NEXT_SESSION_SECONDS = 1.0


class _SessionEnded(Exception):
    """The session that listened is over; the server may be as well as ever: idle sessions are ended by many."""


class Waker:
    """A thread that calls `run` whenever `due_in` says that something is due, from `start` to `close`.

    `run` must not wait for the end of the run; `run_ended` reports it. `due_in` and `run` may raise CatfeederCronError.
    While no notification arrives, the waker tries to listen again every `listen_again_seconds`.
    """

    def __init__(
        self,
        job_id: str,
        database: Database,
        channel: str,
        due_in: Callable[[], float | None],
        run: Callable[[], None],
        listen_again_seconds: float = _LISTEN_AGAIN_SECONDS,
    ) -> None:
        self._job_id = job_id
        self._database = database
        self._channel = channel
        self._due_in = due_in
        self._run = run
        self._listen_again_seconds = listen_again_seconds
        # Used by the thread alone, but for two: `close` sets `_closing`, and `run_ended`, in the thread of a run, may
        # shorten `_pause`.
        self._closing = False
        self._pause = _SHORTEST_PAUSE_SECONDS
        self._ran_at = float("-inf")
        self._logged_failure = ""
        self._polling = False  # as far as the log says
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Held while a thread writes to the pipe or closes it: its number must not be used once another file has it.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"wake-{job_id}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def run_ended(self, *, fruitful: bool) -> None:
        """Have the waker look again, because a run has ended; without a pause if the run did something."""
        if fruitful:
            self._pause = _SHORTEST_PAUSE_SECONDS
        self._wake_thread()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing = True
        self._wake_thread()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():  # otherwise it is still connecting, and closes the pipe when it ends
            self._close_pipe()

    def _close_pipe(self) -> None:
        with self._lock:
            for end in (self._read_end, self._write_end) if self._write_end >= 0 else ():
                os.close(end)
            self._read_end = self._write_end = -1

    def _wake_thread(self) -> None:
        with self._lock:
            if self._write_end >= 0:
                with suppress(BlockingIOError):  # the pipe is full of bytes that the thread has not read yet
                    os.write(self._write_end, b"!")

    def _work(self) -> None:
        try:
            self._watch_on()
        finally:
            self._close_pipe()

    def _watch_on(self) -> None:
        while not self._closing:
            try:
                polling_because = self._listen()
                if polling_because:
                    self._watch(None, polling_because)
            except _SessionEnded:
                self._wait(None, _NEXT_SESSION_SECONDS)
            except DatabaseUnavailable:
                self._wait(None, _RECONNECT_SECONDS)  # the database has logged it
            except CatfeederCronError as error:
                self._log_failure(str(error))
                self._wait(None, _POLL_SECONDS)
            except Exception:
                log.exception("waker_failed", job=self._job_id)
                self._wait(None, _POLL_SECONDS)

    def _listen(self) -> str:
        """Watch for as long as notifications arrive; return why none do. Raises DatabaseUnavailable in an outage."""
        with ExitStack() as opened:
            try:
                connection = opened.enter_context(self._listening())
            except DatabaseUnavailable:
                self._due_in()  # raises in an outage, which is no reason to do without notifications after it
                try:
                    connection = opened.enter_context(self._listening())
                except DatabaseUnavailable as error:
                    return str(error)
            if not self._receives(connection):
                return "" if self._closing else f"our own did not come back within {_ECHO_SECONDS:g} s"
            self._watch(connection)
        return ""

    @contextmanager
    def _listening(self) -> Iterator[Connection]:
        with self._database.session() as connection:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
            yield connection
            if not connection.closed:
                connection.execute("UNLISTEN *")  # a pooler gives the session to another client

    def _receives(self, connection: Connection) -> bool:
        """Whether a notification that another session sends arrives here."""
        self._database.query("SELECT pg_notify(%(channel)s, %(payload)s)", {"channel": self._channel, "payload": "?"})
        until = time.monotonic() + _ECHO_SECONDS
        while not self._closing and time.monotonic() < until:
            if self._wait(connection, until - time.monotonic()):
                return True
        return False

    def _watch(self, connection: Connection | None, polling_because: str = "") -> None:
        until = float("inf") if connection else time.monotonic() + self._listen_again_seconds
        while not self._closing and time.monotonic() < until:
            due_in = self._due_in()
            self._log_polling(polling_because)  # only now: in an outage the line above raises, and the database logs it
            if due_in is None or due_in > 0:
                self._pause = _SHORTEST_PAUSE_SECONDS
                look_in = _POLL_LISTENING_SECONDS if connection else _POLL_SECONDS
                self._wait(connection, min(look_in, due_in or look_in))
            elif (hold := self._ran_at + self._pause - time.monotonic()) > 0:
                if self._wait(connection, hold):
                    self._pause = _SHORTEST_PAUSE_SECONDS
            else:
                if self._ran_at > float("-inf"):
                    self._pause = min(2 * self._pause, _POLL_SECONDS)
                self._ran_at = time.monotonic()
                self._run()
            self._logged_failure = ""

    def _wait(self, connection: Connection | None, seconds: float) -> bool:
        """Wait for a notification or a byte in the pipe; return whether there was a notification."""
        poll = select.poll()  # `select` takes no descriptor from 1024 on
        for end in (self._read_end, *([connection.fileno()] if connection is not None else [])):
            poll.register(end, select.POLLIN)
        ready = {end for end, _ in poll.poll(max(0.0, 1000 * seconds))}
        if self._read_end in ready:
            os.read(self._read_end, 4096)
        if connection is None or connection.fileno() not in ready:
            return False
        try:
            return bool(self._database.notifications(connection))
        except DatabaseUnavailable:
            raise _SessionEnded from None

    def _log_polling(self, polling_because: str) -> None:
        if polling_because and not self._polling:
            log.warning(
                "notifications_do_not_arrive", job=self._job_id, reason=polling_because, look_every=_POLL_SECONDS
            )
        elif self._polling and not polling_because:
            log.info("notifications_arrive_again", job=self._job_id)
        self._polling = bool(polling_because)

    def _log_failure(self, reason: str) -> None:
        if reason != self._logged_failure:
            self._logged_failure = reason
            log.error("waker_failed", job=self._job_id, reason=reason)
