"""Whether the server answers, as far as this process knows, and the two log lines that tell an outage."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from catfeeder_cron import lifecycle
from catfeeder_cron.database.errors import AllInUse, ServerFull, Unanswered
from catfeeder_cron.errors import DatabaseUnavailable
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.database")

_FULL_FOR_SECONDS = 60.0


class Outages:
    """Log the beginning and the end of an outage once each, however many threads meet it. Safe to use from any thread.

    Before the first answer the server counts as not reachable, but no outage is logged.
    """

    def __init__(self) -> None:
        self._trouble = ""
        self._reachable = False
        self._logged = False  # the last line in the log says that the server can't be reached
        self._closed = False
        self._full_at = float("-inf")
        # Any thread that uses the database takes it, for the swap in `_is_news` alone: of two threads that meet an
        # outage together, one logs it. No other lock is taken, and nothing is logged, while it is held.
        self._lock = threading.Lock()
        lifecycle.after_fork(self, Outages._after_fork)

    @property
    def trouble(self) -> str:
        """Return why the server could not be reached when it was last needed, in one line; empty if it was reached."""
        return self._trouble

    @property
    def reachable(self) -> bool:
        """Tell whether the server answered when it was last needed."""
        return self._reachable

    @contextmanager
    def noticed(self, look: Callable[[], None] | None = None) -> Iterator[None]:
        """Log an outage that the block meets, which is any DatabaseUnavailable except AllInUse, and raise it again.

        A connection that broke is none as long as `look` reaches the server by another one.
        """
        try:
            yield
        except AllInUse:
            raise
        except DatabaseUnavailable as error:
            broke = self._reachable and not isinstance(error, Unanswered | ServerFull)
            if not self._closed and not (broke and look and _succeeds(look)):
                self._full_at = time.monotonic() if isinstance(error, ServerFull) else float("-inf")
                self._trouble = str(error)
                if self._is_news(outage=True):
                    log.error("database_unreachable", reason=str(error))
            raise

    def suspect(self) -> None:
        """Take the server for unreachable until it answers again, without logging: a single connection broke."""
        self._reachable = False

    def answered(self) -> None:
        """Record that the server has answered, and log the end of an outage.

        A server whose disk is full answers most of the time: its outage is over when it has not said so for a minute.
        """
        if time.monotonic() - self._full_at < _FULL_FOR_SECONDS:
            self._reachable = True
            return
        self._trouble = ""
        if self._is_news(outage=False):
            log.info("database_reachable_again")

    def close(self) -> None:
        """Log no further outage: from now on this process closes its connections itself."""
        self._closed = True

    def _is_news(self, *, outage: bool) -> bool:
        with self._lock:
            self._reachable = not outage
            before, self._logged = self._logged, outage
            return before != outage

    def _after_fork(self) -> None:
        # A thread that exists in the parent alone may hold the copy of the lock for ever.
        self._lock = threading.Lock()


def _succeeds(look: Callable[[], None]) -> bool:
    with suppress(DatabaseUnavailable):
        look()
        return True
    return False
