"""Runs jobs between their slots, as soon as there is something to do for them."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from catfeeder_cron.database import Database
from catfeeder_cron.errors import PermissionDenied, SchemaProblem, UndefinedObject, UnknownJob
from catfeeder_cron.ledger import Ledger
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.executor import Executor
from catfeeder_cron.scheduler.job_tasks import JobTasks
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.scheduler.waker import Waker


class JobWakers(RunListener):
    """A waker for each scheduled job that declares `wake`. All methods may be called from any thread."""

    def __init__(self, tasks: JobTasks, executor: Executor, database: Database, ledger: Ledger) -> None:
        self._tasks = tasks
        self._executor = executor
        self._database = database
        self._ledger = ledger
        self._wakers: dict[str, Waker] = {}
        self._closed = False
        # Held while wakers are started and while the end is announced: none is started after that. Its holder may take
        # it again: a signal's handler may close this in the middle of a start.
        self._lock = threading.RLock()

    def start(self, job_ids: Iterable[str]) -> None:
        """Start the wakers of these jobs that have none yet. Does nothing after `close`."""
        with self._lock:
            for job_id in () if self._closed else job_ids:
                with suppress(UnknownJob):  # a reload has removed it at this moment
                    self._start(job_id)

    def ended(self, run: Run, report: JobReport, /) -> None:
        """Have the job's waker look again: rows that the run left undone may be due before the next slot."""
        if run.job_id in self._wakers:
            self._wakers[run.job_id].run_ended(fruitful=any(report.counts.values()))

    def close(self) -> None:
        """End the wakers. Idempotent."""
        with self._lock:
            self._closed = True
            wakers = list(self._wakers.values())
        # Without the lock: this waits for their threads.
        for waker in wakers:
            waker.close()

    def _start(self, job_id: str) -> None:
        wake = self._executor.find(job_id)[0].wake
        if wake is not None and job_id not in self._wakers:
            due_in, run = partial(self._due_in, job_id), partial(self._run_soon, job_id)
            self._wakers[job_id] = Waker(job_id, self._database, wake.channel, due_in, run)
            self._wakers[job_id].start()

    def _due_in(self, job_id: str) -> float | None:
        """Return in how many seconds the job has something to do, in the thread of its waker."""
        job, _ = self._executor.find(job_id)
        if job.wake is None or job.refused_on(self._database):
            return None
        try:
            return job.wake.due_in(self._executor.context(job_id))
        except (UndefinedObject, PermissionDenied) as problem:
            raise SchemaProblem(self._executor.explain(job_id, problem)) from None

    def _run_soon(self, job_id: str) -> None:
        """Have a worker run the job, called in the thread of its waker."""
        if not self._executor.stopping:
            self._tasks.run_soon("woken", self._run, job_id)

    def _run(self, job_id: str) -> None:
        """Run a job between its slots, unless it is running here, or paused. Called in a worker thread."""
        job, _ = self._executor.find(job_id)
        self._executor.run_scheduled(job_id, partial(self._ledger.claim_woken, job_id, shared=job.shared), "schedule")
