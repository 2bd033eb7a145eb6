"""Has a job run as soon as there is something to do for it, without waiting for its next slot.

Two things tell: a notification in PostgreSQL, and the time at which the next thing known is due. LISTEN needs a
session to itself, so it has a connection beside the pool; where that can't be had, and behind a transaction pooler,
where no notification arrives, the waker looks by itself every 30 seconds.
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

# The most that passes unseen where no notification tells of it: an UPDATE; or anything, with a pooler in between.
_LISTENING_SECONDS = 60.0
_DEAF_SECONDS = 30.0
# From one run to the next: longer and longer while what is due stays undone (paused, locked, running elsewhere).
_SHORTEST_PAUSE_SECONDS = 0.5
_RECONNECT_SECONDS = 5.0
# Trying costs up to the echo's time, in which nothing is looked at.
_LISTEN_AGAIN_SECONDS = 300.0
_CLOSE_SECONDS = 3.0
# How long our own notification may take.
_ECHO_SECONDS = 5.0


class Waker:
    """A thread that calls `run` whenever `due_in` says that something is due, from `start` to `close`.

    `run` is not to wait for the job's end; `run_ended` tells of it. Either may raise CatfeederCronError. While no
    notification arrives, that is tried again every `listen_again_seconds`.
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
        self._closing = False
        self._pause = _SHORTEST_PAUSE_SECONDS
        self._ran_at = float("-inf")
        self._complaint = ""
        self._deaf = False  # as far as was told
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"wake-{job_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run_ended(self, *, fruitful: bool) -> None:
        """Tell that a run of the job is over: time to look again, and without hesitation if it did something."""
        if fruitful:
            self._pause = _SHORTEST_PAUSE_SECONDS
        self._poke()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing = True
        self._poke()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():  # otherwise it is trying to connect, and does this itself when it ends
            self._close_pipe()

    def _close_pipe(self) -> None:
        with self._lock:
            for end in (self._read_end, self._write_end) if self._write_end >= 0 else ():
                os.close(end)
            self._read_end = self._write_end = -1

    def _poke(self) -> None:
        with self._lock:
            if self._write_end >= 0:
                with suppress(BlockingIOError):  # full of pokes that nobody has seen yet
                    os.write(self._write_end, b"!")

    def _work(self) -> None:
        try:
            self._watch_on()
        finally:
            self._close_pipe()

    def _watch_on(self) -> None:
        while not self._closing:
            try:
                deaf = self._listen()
                self._watch(None, deaf)
            except DatabaseUnavailable:
                self._wait(None, _RECONNECT_SECONDS)  # told by the database itself
            except CatfeederCronError as error:
                self._complain(str(error))
                self._wait(None, _DEAF_SECONDS)
            except Exception:
                log.exception("waker_failed", job=self._job_id)
                self._wait(None, _DEAF_SECONDS)

    def _listen(self) -> str:
        """Watch for as long as notifications arrive; return why none do."""
        with ExitStack() as opened:
            try:
                connection = opened.enter_context(self._listening())
            except DatabaseUnavailable as error:
                return str(error)
            if not self._hears(connection):
                return f"our own did not come back within {_ECHO_SECONDS:g} s"
            self._watch(connection)
        return ""

    @contextmanager
    def _listening(self) -> Iterator[Connection]:
        with self._database.session() as connection:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
            yield connection
            if not connection.closed:
                connection.execute("UNLISTEN *")  # a pooler hands the session to somebody else

    def _hears(self, connection: Connection) -> bool:
        """Whether what is told elsewhere arrives here."""
        self._database.query("SELECT pg_notify(%(channel)s, %(payload)s)", {"channel": self._channel, "payload": "?"})
        until = time.monotonic() + _ECHO_SECONDS
        while not self._closing and time.monotonic() < until:
            if self._wait(connection, until - time.monotonic()):
                return True
        return False

    def _watch(self, connection: Connection | None, deaf: str = "") -> None:
        until = float("inf") if connection else time.monotonic() + self._listen_again_seconds
        while not self._closing and time.monotonic() < until:
            due_in = self._due_in()
            self._tell(deaf)  # now that the rest of the database is there: an outage is told by the database itself
            if due_in is None or due_in > 0:
                self._pause = _SHORTEST_PAUSE_SECONDS
                look_in = _LISTENING_SECONDS if connection else _DEAF_SECONDS
                self._wait(connection, min(look_in, due_in or look_in))
            elif (hold := self._ran_at + self._pause - time.monotonic()) > 0:
                if self._wait(connection, hold):
                    self._pause = _SHORTEST_PAUSE_SECONDS
            else:
                if self._ran_at > float("-inf"):
                    self._pause = min(2 * self._pause, _DEAF_SECONDS)
                self._ran_at = time.monotonic()
                self._run()
            self._complaint = ""

    def _wait(self, connection: Connection | None, seconds: float) -> bool:
        """Wait for a notification or a poke; return whether there was a notification."""
        ends = [self._read_end, *([connection.fileno()] if connection is not None else [])]
        ready, _, _ = select.select(ends, [], [], max(0.0, seconds))
        if self._read_end in ready:
            os.read(self._read_end, 4096)
        if connection is None or connection.fileno() not in ready:
            return False
        return bool(self._database.notifications(connection))

    def _tell(self, deaf: str) -> None:
        if deaf and not self._deaf:
            log.warning("notifications_do_not_arrive", job=self._job_id, reason=deaf, look_every=_DEAF_SECONDS)
        elif self._deaf and not deaf:
            log.info("notifications_arrive_again", job=self._job_id)
        self._deaf = bool(deaf)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            log.error("waker_failed", job=self._job_id, reason=complaint)
