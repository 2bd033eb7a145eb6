"""APScheduler's schedulers with a loop that nothing stops but `halt`, and that can be halted at any moment."""

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.job import Job
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.schedulers.blocking import BlockingScheduler

from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.background_tasks")

_AFTER_FAILURE_SECONDS = 10.0


class TaskThreads(ThreadPoolExecutor):  # type: ignore[misc]  # APScheduler has no types
    """Threads that run tasks, until the program ends."""

    def _do_submit_job(self, job: Job, run_times: list[datetime]) -> None:
        try:
            super()._do_submit_job(job, run_times)
        except RuntimeError as error:
            # The program is ending, and takes away the means to run something before its schedulers hear of it.
            if "shutdown" not in str(error):
                raise


class Scheduler(BlockingScheduler):  # type: ignore[misc]  # APScheduler has no types
    """What both kinds of scheduler do otherwise than APScheduler's.

    It is a lifecycle.Resource: a BackgroundTasks that is dropped while it runs is halted, and does not wait for tasks.
    """

    def __init__(self, longest_sleep: float, **options: Any) -> None:
        # Held while the loop looks for due tasks and while it is halted, so that neither comes in between the other.
        self._turn = threading.RLock()
        self.on_turn: Callable[[], None] | None = None
        self._longest_sleep = longest_sleep
        super().__init__(**options)

    def _process_jobs(self) -> float:
        """Submit what is due, and return how many seconds the loop may sleep.

        The sleep is measured by a clock that neither a change of the system's time nor a suspended machine moves
        on. After either of them a long sleep would last far beyond the next run.
        """
        try:
            with self._turn:
                until_next_run = super()._process_jobs() if self.running else None
        except Exception:  # of a trigger: foreign code
            log.exception("due_tasks_not_found")
            until_next_run = _AFTER_FAILURE_SECONDS
        self._tell_turn()
        return self._longest_sleep if until_next_run is None else min(until_next_run, self._longest_sleep)

    def _tell_turn(self) -> None:
        if self.on_turn:
            try:
                self.on_turn()
            except Exception:
                log.exception("on_turn_failed")

    def halt(self) -> list[Job]:
        """Shut down without waiting for running jobs, and return the jobs that have a run ahead of them.

        APScheduler's own `shutdown` may come while the loop is busy with a job that has no further run: the loop
        then dies because it no longer finds that job, which would also be among those returned here. A second call
        returns none.
        """
        with self._turn:
            if not self.running:
                return []
            jobs: list[Job] = self.get_jobs()
            BlockingScheduler.shutdown(self, wait=False)
        return jobs

    def ask_to_end(self) -> None:
        self.halt()

    def wait_for_schedule(self) -> None:
        for executor in self._executors.values():
            executor.shutdown(wait=True)

    def let_go(self, *, at_exit: bool) -> None:  # noqa: ARG002 - there is nothing to wait for
        self.halt()

    def renew_locks(self) -> None:
        """Make the locks anew, in a forked process: a thread that is not there may hold them for ever."""
        self._turn = threading.RLock()
        self._executors_lock = self._create_lock()
        self._jobstores_lock = self._create_lock()
        self._listeners_lock = self._create_lock()


class ThreadScheduler(Scheduler, BackgroundScheduler):  # type: ignore[misc]
    """Keeps the schedule in a thread of its own."""

    def halt(self) -> list[Job]:
        thread = self._thread
        jobs = super().halt()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        return jobs


class ForegroundScheduler(Scheduler):
    """A blocking scheduler whose `start` returns, so that it can be made under a lock, and whose `loop` blocks.

    APScheduler loses a task that is added by another thread just while it starts.
    """

    def _main_loop(self) -> None:
        pass

    def loop(self) -> None:
        super()._main_loop()
