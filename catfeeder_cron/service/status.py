"""The line of `systemctl status`, told whenever it changes; and the signs of life that systemd wants."""

import threading
from collections.abc import Callable
from datetime import timedelta

from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.service.health import Health
from catfeeder_cron.service.sd_notify import Notifier

# Said anew every two seconds while jobs end, so that no stop is cut short by TimeoutStopSec= and a dead one is.
_STOP_EXTENSION = timedelta(seconds=10)


class StatusReporter(RunListener):
    """All methods may be called from any thread; none raises by itself."""

    def __init__(self, notifier: Notifier, health: Health) -> None:
        self._notifier = notifier
        self._health = health
        self._started = False
        self._refused: str | None = None  # why the last reload was
        self._told = ""
        # What is told last must be the newest, so it is looked at and told in one go.
        self._telling = threading.Lock()

    def turned(self) -> None:
        """The schedule's loop has turned, which is what being alive means. The first time, the start is over."""
        self._health.turned()
        self._notifier.alive()
        first, self._started = not self._started, True
        self._tell(ready=first)

    def began(self, _run: Run, /) -> None:
        self._tell()

    def ended(self, _run: Run, _report: JobReport, /) -> None:
        self._tell()

    def stuck(self, _run: Run, /) -> None:
        self._tell()

    def beat(self, _reached: bool, /) -> None:
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
            self._health.stopping()
            self._told = self._health.summary()
            self._notifier.stopping(self._told)
        self.still_stopping()

    def still_stopping(self) -> None:
        """Running jobs are still ending, as they may."""
        self._notifier.extend_timeout(_STOP_EXTENSION)
        self._notifier.alive()

    def _tell(self, *, ready: bool = False) -> None:
        with self._telling:
            words = self._summary()
            if ready:
                self._notifier.ready(words)
            elif words != self._told:
                self._notifier.status(words)
            self._told = words

    def _summary(self) -> str:
        words = self._health.summary()
        if self._refused:
            return f"reload refused, the old configuration stays: {self._refused}; {words}"
        return words
