"""APScheduler's schedulers, with a loop that only `halt` ends, and that `halt` can end at any moment."""

import logging
import threading
from collections.abc import Callable, MutableMapping
from datetime import datetime
from typing import Any

from apscheduler.events import EVENT_JOB_REMOVED, EVENT_JOB_SUBMITTED, SchedulerEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.job import Job
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.schedulers.blocking import BlockingScheduler

from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.background_tasks")

_AFTER_FAILURE_SECONDS = 10.0


class SkipsToldOnce(logging.LoggerAdapter[logging.Logger]):
    """APScheduler's log, where a task that is skipped because it still runs is told once until it is run again.

    APScheduler tells it at each due time: every second in an outage, while a run waits. It calls this under a lock.
    """

    def __init__(self, is_told_elsewhere: Callable[[Job], bool]) -> None:
        super().__init__(logging.getLogger("apscheduler.scheduler"))
        self._is_told_elsewhere = is_told_elsewhere
        self._told: set[str] = set()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave the message as it is."""
        return msg, kwargs

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log it, unless that would tell a skipped run again."""
        if str(msg).startswith('Execution of job "%s" skipped: maximum number of running instances'):
            if args[0].id in self._told or self._is_told_elsewhere(args[0]):
                return
            self._told.add(args[0].id)
        super().log(level, msg, *args, **kwargs)

    def forget(self, job_id: str) -> None:
        """Log the next skipped run of a task again: it was run since, or removed."""
        self._told.discard(job_id)


class TaskThreads(ThreadPoolExecutor):  # type: ignore[misc]  # APScheduler has no types
    """The threads that run tasks. It ignores tasks that come due while the program ends."""

    def _do_submit_job(self, job: Job, run_times: list[datetime]) -> None:
        try:
            super()._do_submit_job(job, run_times)
        except RuntimeError as error:
            # The interpreter ends its executors before it tells the schedulers.
            if "shutdown" not in str(error):
                raise


class Scheduler(BlockingScheduler):  # type: ignore[misc]  # APScheduler has no types
    """Changes APScheduler's loop and its end, for both kinds of scheduler.

    It is a lifecycle.Resource: if a running BackgroundTasks is dropped, its scheduler halts without waiting for tasks.
    """

    def __init__(self, longest_sleep: float, **options: Any) -> None:
        # Held by the loop's thread while it looks for due tasks, and by the thread that halts it: neither may come
        # between the steps of the other.
        self._turn = threading.RLock()
        self.on_turn: Callable[[], None] | None = None
        self._longest_sleep = longest_sleep
        self._log = SkipsToldOnce(lambda job: getattr(_owner(job), "accounts_for_skipped_runs", False))
        super().__init__(logger=self._log, **options)

    def _process_jobs(self) -> float:
        """Submit the due tasks, and return how many seconds the loop may sleep.

        The clock that measures the sleep ignores a change of the system's time and stops while the machine is
        suspended: after either, a long sleep would last far beyond the next run.
        """
        try:
            with self._turn:
                until_next_run = super()._process_jobs() if self.running else None
        except Exception:  # of a trigger, which is foreign code
            log.exception("due_tasks_not_found")
            until_next_run = _AFTER_FAILURE_SECONDS
        self._call_on_turn()
        return self._longest_sleep if until_next_run is None else min(until_next_run, self._longest_sleep)

    def _dispatch_event(self, event: SchedulerEvent) -> None:
        if event.code in {EVENT_JOB_SUBMITTED, EVENT_JOB_REMOVED}:
            self._log.forget(event.job_id)
        super()._dispatch_event(event)

    def _call_on_turn(self) -> None:
        if self.on_turn:
            try:
                self.on_turn()
            except Exception:
                log.exception("on_turn_failed")

    def halt(self) -> list[Job]:
        """Shut down without waiting for running jobs, and return the jobs that have a run ahead of them.

        APScheduler's own `shutdown` may come while the loop handles a job that has no further run: then the loop fails
        because it does not find that job, and the job would be returned here. A second call returns none.
        """
        with self._turn:
            if not self.running:
                return []
            jobs: list[Job] = self.get_jobs()
            BlockingScheduler.shutdown(self, wait=False)
        return jobs

    def ask_to_end(self) -> None:
        """Halt."""
        self.halt()

    def wait_for_schedule(self) -> None:
        """Wait for the tasks that run."""
        for executor in self._executors.values():
            executor.shutdown(wait=True)

    def let_go(self, *, at_exit: bool) -> None:  # noqa: ARG002 - there is nothing to wait for
        """Halt, without waiting for tasks."""
        self.halt()

    def renew_locks(self) -> None:
        """Replace the locks, in a forked process: a thread that does not exist there may hold them for ever."""
        self._turn = threading.RLock()
        self._executors_lock = self._create_lock()
        self._jobstores_lock = self._create_lock()
        self._listeners_lock = self._create_lock()


def _owner(job: Job) -> object:
    """Return the object whose method a task calls."""
    return getattr(job.func, "__self__", None)


class ThreadScheduler(Scheduler, BackgroundScheduler):  # type: ignore[misc]
    """A scheduler with a thread of its own."""

    def halt(self) -> list[Job]:
        """Do as the base class, and wait for the thread, unless this is that thread."""
        thread = self._thread
        jobs = super().halt()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        return jobs


class ForegroundScheduler(Scheduler):
    """A blocking scheduler whose `start` returns, so that it can be called under a lock, and whose `loop` blocks.

    Without the lock, APScheduler loses a task that another thread adds just while it starts.
    """

    def _main_loop(self) -> None:
        pass

    def loop(self) -> None:
        """Keep the schedule in this thread, until another thread calls `halt`."""
        super()._main_loop()
