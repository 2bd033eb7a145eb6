"""Passes on what happens in the daemon to those outside: systemd, and the metrics where there are any."""

import threading
from collections.abc import Callable
from datetime import timedelta

from catfeeder_cron.report import JobReport
from catfeeder_cron.service.health import Condition
from catfeeder_cron.service.sd_notify import Notifier

# Said anew every two seconds while jobs end, so that no stop is cut short by TimeoutStopSec= and a dead one is.
_STOP_EXTENSION = timedelta(seconds=10)


class Herald:
    """All methods may be called from any thread; none raises by itself."""

    def __init__(
        self, notifier: Notifier, condition: Condition, count: Callable[[JobReport], None] | None = None
    ) -> None:
        self._notifier = notifier
        self._condition = condition
        self._count = count
        self._started = False
        self._refused: str | None = None  # why the last reload was
        self._told = ""
        # What is told last must be the newest, so the condition is looked at and told in one go.
        self._telling = threading.Lock()

    def turned(self) -> None:
        """The schedule's loop has turned, which is what being alive means. The first time, the start is over."""
        self._condition.turned()
        self._notifier.alive()
        first, self._started = not self._started, True
        self._tell(ready=first)

    def changed(self, report: JobReport | None) -> None:
        """A run began or ended (then with its report), or the database was tried."""
        if report and self._count:
            self._count(report)
        self._tell()

    def reload(self, read_again: Callable[[], str | None]) -> None:
        """Have the configuration read again; `read_again` returns why that was refused, if it was.

        A refusal is told until the next reload.
        """
        self._notifier.reloading()
        self._refused = None
        try:
            self._refused = read_again()
        finally:  # systemd waits for this, whatever happened
            self._tell(ready=True)

    def stopping(self) -> None:
        """Nothing new begins; jobs that are running end."""
        with self._telling:
            self._condition.stopping()
            self._told = self._condition.in_words()
            self._notifier.stopping(self._told)
        self.still_stopping()

    def still_stopping(self) -> None:
        """Running jobs are still ending, as they may."""
        self._notifier.extend_timeout(_STOP_EXTENSION)
        self._notifier.alive()

    def _tell(self, *, ready: bool = False) -> None:
        with self._telling:
            words = self._in_words()
            if ready:
                self._notifier.ready(words)
            elif words != self._told:
                self._notifier.status(words)
            self._told = words

    def _in_words(self) -> str:
        words = self._condition.in_words()
        if self._refused:
            return f"reload refused, the old configuration stays: {self._refused}; {words}"
        return words
