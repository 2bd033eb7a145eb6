"""Passes on what happens in the daemon to those outside: systemd, and the metrics where there are any."""

from collections.abc import Callable
from datetime import timedelta

from catfeeder_cron.condition import Condition
from catfeeder_cron.job import JobReport
from catfeeder_cron.service import Notifier

# Said anew every two seconds while jobs end, so that no stop is cut short by TimeoutStopSec= and a dead one is.
_PATIENCE = timedelta(seconds=10)


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

    def turned(self) -> None:
        """The schedule's loop has turned, which is what being alive means. The first time, the start is over."""
        self._condition.turned()
        self._notifier.alive()
        if self._started:
            self._tell()
        else:
            self._started = True
            self._ready()

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
            self._ready()

    def stopping(self) -> None:
        """Nothing new begins; jobs that are running end."""
        self._condition.stopping()
        self._told = self._condition.in_words()
        self._notifier.stopping(self._told)
        self.still_stopping()

    def still_stopping(self) -> None:
        """Running jobs are still ending, as they may."""
        self._notifier.extend_timeout(_PATIENCE)
        self._notifier.alive()

    def _ready(self) -> None:
        self._told = self._in_words()
        self._notifier.ready(self._told)

    def _in_words(self) -> str:
        words = self._condition.in_words()
        if self._refused:
            return f"reload refused, the old configuration stays: {self._refused}; {words}"
        return words

    def _tell(self) -> None:
        words = self._in_words()
        if words != self._told:
            self._told = words
            self._notifier.status(words)
