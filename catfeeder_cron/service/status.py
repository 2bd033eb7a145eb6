"""Report the daemon's status to systemd whenever it changes, and the signs of life for its watchdog."""

import threading
from collections.abc import Callable
from datetime import timedelta

from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.service.health import Health
from catfeeder_cron.service.sd_notify import Notifier

# Renewed every two seconds while jobs end, so that TimeoutStopSec= ends only a stop that makes no progress.
_STOP_EXTENSION = timedelta(seconds=10)


class StatusReporter(RunListener):
    """Sends the health's summary to systemd at every event of a run. All methods may be called from any thread."""

    def __init__(self, notifier: Notifier, health: Health) -> None:
        self._notifier = notifier
        self._health = health
        self._started = False
        self._refused: str | None = None  # why the last reload was refused
        self._sent = ""
        # Held while a thread reads the summary and sends it, so that the summary sent last is the newest.
        self._sending = threading.Lock()

    def turned(self) -> None:
        """Report that the scheduler's loop has turned: the process is alive, and after the first turn it is ready."""
        self._health.turned()
        self._notifier.alive()
        first, self._started = not self._started, True
        self._send(ready=first)

    def began(self, _run: Run, /) -> None:
        """Send the summary if it has changed."""
        self._send()

    def ended(self, _run: Run, _report: JobReport, /) -> None:
        """Send the summary if it has changed."""
        self._send()

    def stuck(self, _run: Run, /) -> None:
        """Send the summary if it has changed."""
        self._send()

    def beat(self, _reached: bool, /) -> None:
        """Send the summary if it has changed."""
        self._send()

    def reload(self, read_again: Callable[[], str | None]) -> None:
        """Call `read_again` as a reload; it returns the reason if it refused the configuration.

        The status shows a refusal until the next reload.
        """
        self._notifier.reloading()
        self._refused = None
        try:
            self._refused = read_again()
        finally:  # systemd waits for this, even after an error
            self._send(ready=True)

    def stopping(self) -> None:
        """Report that the daemon is stopping and waits for the running jobs."""
        with self._sending:
            self._health.stopping()
            self._sent = self._health.summary()
            self._notifier.stopping(self._sent)
        self.still_stopping()

    def still_stopping(self) -> None:
        """Ask systemd for more time while running jobs end."""
        self._notifier.extend_timeout(_STOP_EXTENSION)
        self._notifier.alive()

    def _send(self, *, ready: bool = False) -> None:
        with self._sending:
            summary = self._summary()
            if ready:
                self._notifier.ready(summary)
            elif summary != self._sent:
                self._notifier.status(summary)
            self._sent = summary

    def _summary(self) -> str:
        summary = self._health.summary()
        if self._refused:
            return f"reload refused, the old configuration stays: {self._refused}; {summary}"
        return summary
