"""Asks runs to stop whose time is used up, and reports those that don't."""

from datetime import timedelta

from catfeeder_cron.logs import get_logger
from catfeeder_cron.scheduler.listeners import Listeners, Run
from catfeeder_cron.scheduler.open_runs import OpenRuns

log = get_logger("catfeeder_cron.scheduler")

# A run that does not end this long after its timeout is stuck. A callable that does not end has been killed by then.
_STUCK_AFTER = timedelta(seconds=15)
_REPORT_STUCK_EVERY = timedelta(minutes=5)


class Timeouts:
    """Enforces the timeouts of the open runs, and tells `listeners` which run is stuck."""

    def __init__(self, runs: OpenRuns, listeners: Listeners) -> None:
        self._runs = runs
        self._listeners = listeners

    @property
    def stuck(self) -> list[str]:
        """The ids of the jobs that still run 15 seconds after their timeout, in alphabetical order."""
        return sorted(run.job_id for run in self._runs.under_way if run.control.overdue() >= _STUCK_AFTER)

    def enforce(self) -> float:
        """Ask runs to stop whose time is used up, and report those that are stuck.

        Returns after how many seconds to look again; infinite without runs. One thread at a time may call it.
        """
        runs = self._runs.under_way
        for run in runs:
            overdue = run.control.overdue()
            if overdue >= timedelta(0):
                run.control.time_out()
            if overdue >= _STUCK_AFTER:
                self._report_stuck(run, overdue)
        return max(0.0, min((_look_again_in(run).total_seconds() for run in runs), default=float("inf")))

    def _report_stuck(self, run: Run, overdue: timedelta) -> None:
        if run.stuck_reported_at is None:
            self._listeners.stuck(run)
        if run.stuck_reported_at is None or overdue - run.stuck_reported_at >= _REPORT_STUCK_EVERY:
            run.stuck_reported_at = overdue
            log.error("job_stuck", job=run.job_id, run_id=run.run_id, overdue_seconds=round(overdue.total_seconds()))


def _look_again_in(run: Run) -> timedelta:
    """Return when a run's time is used up or, once it was asked to stop, when it is to be reported as stuck."""
    overdue = run.control.overdue()
    if not run.control.stop:
        return -overdue
    if run.stuck_reported_at is None:
        return _STUCK_AFTER - overdue
    return run.stuck_reported_at + _REPORT_STUCK_EVERY - overdue
