"""The tasks on a BackgroundTasks that stand for jobs: one at the slots of each job, further ones in between."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, get_args

from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.scheduler.triggers import ScheduleTrigger

Purpose = Literal["catching up", "coming again", "woken", "recovering", "retrying", "tending"]


class JobTasks(RunListener):
    """Adds and removes the tasks of jobs, and nothing after `close`. All methods may be called from any thread."""

    accounts_for_skipped_runs = True
    """The ledger has a row for each slot that passed, with its reason, so APScheduler need not tell it."""

    def __init__(self, tasks: BackgroundTasks) -> None:
        self._tasks = tasks
        self._closed = False
        # Held while a task is added and while the end is announced: a heartbeat or a waker that is at work at that
        # moment adds nothing afterwards. Its holder may take it again: a signal's handler may close this at any point.
        self._lock = threading.RLock()

    def add(
        self, job_id: str, trigger: ScheduleTrigger, summary: str, call: Callable[..., None], *args: object
    ) -> bool:
        """Have a worker call `call(job_id, *args)` at every slot, in place of an earlier task of the job.

        Returns False where that failed; the reason is logged.
        """
        with self._lock:
            if self._closed:
                return False
            added = self._tasks.safe_add_task(
                self._call,
                args=[call, job_id, *args],
                trigger=trigger,
                id=job_id,
                name=summary,
                replace_existing=True,
                # One runs, one finds out that it is still running; more would only pile up.
                max_instances=2,
            )
        return not isinstance(added, int)

    def run_soon(
        self,
        purpose: Purpose,
        call: Callable[..., None],
        job_id: str,
        *args: object,
        at: datetime | None = None,
        at_once: int = 1,
    ) -> None:
        """Have a worker call `call(job_id, *args)` once: now, or `at` a time.

        It replaces a call for this purpose that has not begun; `at_once` calls for it may run at the same time.
        """
        with self._lock:
            if self._closed:
                return
            task_id = _task_id(job_id, purpose)
            self._tasks.safe_add_task(
                self._call,
                args=[call, job_id, *args],
                trigger="date",
                run_date=at,
                id=task_id,
                name=task_id,
                replace_existing=True,
                max_instances=at_once,
            )

    def remove(self, job_id: str) -> None:
        """Remove the tasks of a job. A job may have none: the only slot of a date may be over."""
        further = (_task_id(job_id, purpose) for purpose in get_args(Purpose))
        self._tasks.remove_tasks_of(self, job_id, *further)

    def waits_too_long(self, job_id: str, trigger: ScheduleTrigger) -> bool:
        """Whether the job's task waits for a time that the system's clock showed before it was put back."""
        task = next((task for task in self._tasks.tasks if self._tasks.running and task.id == job_id), None)
        soon = trigger.get_next_fire_time(None, datetime.now(UTC))
        return bool(task and soon and soon < task.next_run_time)

    def stuck(self, _run: Run, /) -> None:
        """Have another worker in place of the one that the stuck run keeps."""
        self._tasks.replace_worker()

    def close(self) -> None:
        """Remove all tasks, and add none any more. Idempotent."""
        with self._lock:
            self._closed = True
        self._tasks.remove_tasks_of(self)

    def _call(self, call: Callable[..., None], job_id: str, *args: object) -> None:
        """Call it; as a method of this object it marks the tasks that `remove_tasks_of` removes."""
        call(job_id, *args)


def _task_id(job_id: str, purpose: Purpose) -> str:
    return f"{job_id} ({purpose})"
