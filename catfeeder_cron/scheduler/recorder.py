"""Records how runs ended, and records again what the database has lost."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, PermissionDenied
from catfeeder_cron.ledger.ledger import Ledger
from catfeeder_cron.ledger.records import Closed
from catfeeder_cron.logs import get_logger
from catfeeder_cron.scheduler.listeners import Listeners, Run
from catfeeder_cron.scheduler.open_runs import EndedRun, OpenRuns, aborted_report

log = get_logger("catfeeder_cron.scheduler")

ANSWER_LOST = "the database was cut off while the run was claimed"


class Recorder:
    """Records the runs of one process that have ended. All methods may be called from any thread."""

    def __init__(self, ledger: Ledger, runs: OpenRuns, listeners: Listeners) -> None:
        self._ledger = ledger
        self._runs = runs
        self._listeners = listeners
        self._unanswered: set[int] = set()
        # Held while ended runs are recorded, by whichever thread does it: each is recorded once, in order.
        self._recording = threading.Lock()

    def record(self) -> None:
        """Record the runs that have ended, the oldest first. Raises DatabaseError, and keeps those that are left."""
        retries: list[tuple[str, timedelta]] = []
        try:
            with self._recording:
                while unrecorded := self._runs.unrecorded:
                    ended = unrecorded[0]
                    self._end_what_goes_on(ended)
                    closed = self._close_run(ended)
                    if closed.vanished:
                        self._ledger.restore(ended.record())
                    self._runs.recorded(ended)
                    if closed.retry_in is not None:
                        retries.append((ended.report.job, closed.retry_in))
                    _tell_if_not_recorded(ended, closed)
        finally:  # without the lock: a listener may end or claim runs itself
            for job, retry_in in retries:
                self._listeners.retry(job, retry_in)

    def go_on_as(self, run: Run, run_id: int) -> None:
        """Have a run go on under another number, because the server has lost its record. Asks the database nothing."""
        log.warning("run_recorded_again", job=run.job_id, run_id=run_id, before=run.run_id)
        self._runs.renumber(run, run_id)
        run.control.application_name = self._ledger.backends.name_for(run_id)

    def restore(self) -> None:
        """Record the runs anew whose records the database has lost, as far as this process remembers them."""
        lost = [ended for ended in self._runs.recorded_lately() if self._ledger.restore(ended.record())]
        if lost:
            jobs = sorted({ended.report.job for ended in lost})
            log.warning("runs_recorded_again", runs=len(lost), jobs=jobs)

    def close_unanswered(self, open_runs: set[int]) -> None:
        """Close runs that were claimed for this process, but whose number never arrived here.

        A run is closed when two heartbeats in a row find it: at the first its number may still be on the way.
        """
        unanswered = self._runs.unknown_of(open_runs)
        recorded = {ended.run_id: ended.report for ended in self._runs.recorded_lately()}
        for run_id in unanswered & self._unanswered:
            # A server that lost its last seconds may have given the number of one job's run to another's.
            if run_id not in recorded or self._ledger.close(run_id, recorded[run_id]).vanished:
                self._ledger.close(run_id, aborted_report("", ANSWER_LOST, {}, timedelta(0)))
        self._unanswered = unanswered

    def end_backends(self, working: Mapping[int, str]) -> None:
        """End the statements of dead processes' runs that the server still works on; their runs are closed after that.

        A backend of a role that this one may not touch is waited for.
        """
        for pid, description in working.items():
            try:
                self._ledger.backends.end(pid)
                log.warning("statement_of_dead_run_ended", run=description, backend=pid)
            except PermissionDenied as error:
                log.warning("dead_run_still_at_work", run=description, backend=pid, reason=str(error))

    def _end_what_goes_on(self, ended: EndedRun) -> None:
        """End the statements that the server still works on for a run whose connection broke.

        Its job can begin again once it is recorded.
        """
        if ended.report.outcome in ("succeeded", "skipped"):
            return
        try:
            gone, left = self._ledger.backends.end_those_of(ended.run_id)
            if left:
                reason = "the server has not ended its statement within 5 s"
                log.warning("ended_run_still_at_work", job=ended.report.job, run_id=ended.run_id, reason=reason)
            elif gone:
                log.warning("statement_of_ended_run_ended", job=ended.report.job, run_id=ended.run_id)
        except DatabaseUnavailable:
            raise
        except DatabaseError as error:
            log.warning("ended_run_still_at_work", job=ended.report.job, run_id=ended.run_id, reason=str(error))

    def _close_run(self, ended: EndedRun) -> Closed:
        try:
            return self._ledger.close(ended.run_id, ended.report, ended.retries)
        except DatabaseUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - counts that are no numbers, say
            # The ledger would refuse it again, and it would hold up every claim behind it.
            log.error("report_not_recorded", job=ended.report.job, run_id=ended.run_id, reason=str(error))
            bare = replace(ended.report, reason="its report could not be recorded; see the log", counts={})
            return self._ledger.close(ended.run_id, bare, ended.retries)


def _tell_if_not_recorded(ended: EndedRun, closed: Closed) -> None:
    run = {"job": ended.report.job, "run_id": ended.run_id, "outcome": ended.report.outcome}
    if closed.vanished:
        log.warning("run_recorded_again", **run)
    elif closed.by_another:
        log.warning("run_was_closed_by_another", **run)
