"""Runs Python functions on a schedule, in threads of this process.

`BackgroundTasks` wraps an APScheduler scheduler and prevents its pitfalls: an interval of 0 becomes one second, a late
run is dropped, a duplicate id raises only at the start, a stopped scheduler starts again without its jobs, and waiting
for running jobs deadlocks as soon as one of them changes the schedule.
"""

import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from typing import Any, Self, final

from apscheduler.events import (
    EVENT_JOB_ADDED,
    EVENT_JOB_ERROR,
    EVENT_JOB_EXECUTED,
    EVENT_JOB_SUBMITTED,
    JobEvent,
)
from apscheduler.job import Job
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers import (
    SchedulerAlreadyRunningError,
    SchedulerNotRunningError,
)
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.date import DateTrigger
from apscheduler.triggers.interval import IntervalTrigger

from catfeeder_cron import lifecycle
from catfeeder_cron.errors import UnknownJob
from catfeeder_cron.logs import get_logger, show_debug_records
from catfeeder_cron.scheduler.haltable import ForegroundScheduler, TaskThreads, ThreadScheduler

log = get_logger("catfeeder_cron.background_tasks")

_DEFAULT_INTERVAL_SECONDS = 5
_LONGEST_SLEEP_SECONDS = 60
_TRIGGERS = {"interval": IntervalTrigger, "cron": CronTrigger, "date": DateTrigger}
_INTERVAL_UNITS = ("weeks", "days", "hours", "minutes", "seconds")
_TASK_STATE = (
    "func",
    "trigger",
    "args",
    "kwargs",
    "id",
    "name",
    "misfire_grace_time",
    "coalesce",
    "max_instances",
    "next_run_time",
)
_TASK_OPTIONS = frozenset(_TASK_STATE) - {"func", "trigger", "args", "kwargs"} | {"replace_existing"}
_DEBUG_EVENTS = {
    EVENT_JOB_ADDED: "task_added",
    EVENT_JOB_SUBMITTED: "task_submitted",
    EVENT_JOB_EXECUTED: "task_finished",
    EVENT_JOB_ERROR: "task_failed",
}


@final
class BackgroundTasks:
    """Run functions at intervals, by cron fields or once at a date.

    Tasks run in up to `max_workers` threads. By default a further thread keeps the schedule; with `blocking` the
    thread that calls `start` does. A task that raises, even `SystemExit`, is logged with its traceback by the logger
    `apscheduler.executors.default`, and the schedule goes on. A late run still takes place, several runs of a task that
    are due at once become one, and a task never overlaps itself, unless its options say otherwise.

    The thread that keeps the schedule looks for due tasks at least every `turn_every_seconds`, paused or not, however
    busy the workers are.

    The `safe_*` methods log errors and return `success` or `error`; the others raise. `debug` makes the debug records
    of this package visible: by the handlers of the program's logging, on standard error where it has none. They report
    each start, stop, pause and resume, and each task that is added, submitted to a worker, finished or failed.

    All methods may be called from any thread, and from within tasks. The end of a `with` block stops the scheduler, its
    beginning doesn't start it. When the object is dropped, or the program ends, its scheduler shuts down, and the end
    of the program waits for running tasks; a task that refers to the object keeps it alive. In a forked process, an
    object that was started before the fork is not running and can't be started: make or start it after the fork.
    """

    def __init__(
        self,
        success: int = 0,
        error: int = 84,
        debug: bool = False,
        *,
        blocking: bool = False,
        max_workers: int = 10,
        timezone: str | tzinfo = "UTC",
        turn_every_seconds: float = _LONGEST_SLEEP_SECONDS,
    ) -> None:
        self._success = success
        self._error = error
        self._debug = debug
        self._blocking = blocking
        self._max_workers = max_workers
        # Held while a state or a task changes, by any thread and by running tasks. Its holder may take it again.
        self._lock = threading.RLock()
        self._looping = False  # a blocking start() has not returned yet
        self._drained = threading.Event()  # unset while a stop() waits for running tasks
        self._drained.set()
        self._worker = threading.local()  # has the attribute `ours` in the threads that run our tasks
        self._closed: Callable[[], None] | None = None  # tells `lifecycle` of a stop; None while not running
        self._is_the_parents = False  # it was running when this process was forked
        self._executor = self._new_executor()
        self._scheduler = (ForegroundScheduler if blocking else ThreadScheduler)(
            longest_sleep=min(turn_every_seconds, _LONGEST_SLEEP_SECONDS),
            timezone=timezone,
            executors={"default": self._executor},
            job_defaults={
                "misfire_grace_time": None,
                "coalesce": True,
                "max_instances": 1,
            },
        )
        if debug:
            show_debug_records()
            self._scheduler.add_listener(_log_event, functools.reduce(int.__or__, _DEBUG_EVENTS))
        lifecycle.after_fork(self, BackgroundTasks._after_fork)

    def on_turn(self, call: Callable[[], None]) -> None:
        """Have the thread that keeps the schedule call `call` each time that it has looked for due tasks.

        `call` must neither block nor raise.
        """
        self._scheduler.on_turn = call

    def __init_subclass__(cls) -> None:
        raise TypeError("BackgroundTasks is final and can't be subclassed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.safe_stop()
        self._drained.wait()  # for a stop() that another thread has begun

    @property
    def success(self) -> int:
        """The value that the `safe_*` methods return for a success."""
        return self._success

    @property
    def error(self) -> int:
        """The value that the `safe_*` methods return for a failure."""
        return self._error

    @property
    def debug(self) -> bool:
        """Whether debug records were asked for."""
        return self._debug

    @property
    def running(self) -> bool:
        """Whether the scheduler is started, paused or not."""
        return bool(self._scheduler.running) and not self._is_the_parents

    @property
    def timezone(self) -> tzinfo:
        """The zone of triggers that name none."""
        zone: tzinfo = self._scheduler.timezone
        return zone

    @property
    def tasks(self) -> list[Job]:
        """The tasks that still have a run ahead of them."""
        with self._lock:
            return [] if self._is_the_parents else list(self._scheduler.get_jobs())

    def add_task(
        self,
        func: Callable[..., object],
        args: list[Any] | tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        trigger: str | BaseTrigger = "interval",
        seconds: float | None = None,
        **options: Any,
    ) -> Job:
        """Run `func(*args, **kwargs)` whenever `trigger` says, before the start or while running.

        `trigger` is "interval" (options `weeks`, `days`, `hours`, `minutes`, `seconds`; 5 seconds where none of
        them is given), "cron" (at least one of `minute`, `hour`, `day_of_week` ...), "date" (`run_date`, default now),
        or an APScheduler trigger. `options` are further ones of the trigger, and APScheduler's `id`, `name`,
        `max_instances`, `coalesce`, `misfire_grace_time`, `next_run_time` and `replace_existing` of the task.

        Raises ValueError, and adds nothing, when an argument can't be used or the id is taken.
        """
        if seconds is not None:
            options["seconds"] = seconds
        try:
            _check_call(func, args, kwargs)
            task_options = {name: options.pop(name) for name in _TASK_OPTIONS & options.keys()}
            schedule = _make_trigger(trigger, options, self.timezone)
            never = schedule.get_next_fire_time(None, datetime.now(self.timezone)) is None
            if never and "next_run_time" not in task_options:
                raise ValueError(f"its trigger {schedule} has no run ahead of it")
            return self._put(func, schedule, args=args, kwargs=kwargs, **task_options)
        except Exception as error:  # triggers and callables are foreign code, and may raise anything
            name = getattr(func, "__qualname__", repr(func))
            raise ValueError(f"can't add the task {name}: {error}") from error

    def safe_add_task(
        self,
        func: Callable[..., object],
        args: list[Any] | tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        trigger: str | BaseTrigger = "interval",
        seconds: float | None = None,
        **options: Any,
    ) -> Job | int:
        """Do as `add_task`, but log an error and return `error` instead of raising."""
        try:
            return self.add_task(func, args, kwargs, trigger, seconds, **options)
        except ValueError as error:
            log.error("task_not_added", reason=str(error))
            return self._error

    def remove_task(self, job_id: str) -> None:
        """Remove a task; a run that has begun goes on. Raises UnknownJob."""
        try:
            with self._lock:
                if self._is_the_parents:
                    raise JobLookupError(job_id)
                self._scheduler.remove_job(job_id)
        except JobLookupError as error:
            raise UnknownJob(f"can't remove the task {job_id!r}: no task has this id") from error

    def remove_tasks_of(self, owner: object, *job_ids: str) -> None:
        """Remove every task whose function is a method of `owner`; with `job_ids`, only those of them with these ids.

        A task that another owner has added under one of these ids stays.
        """
        with self._lock:
            for task in self.tasks:
                if getattr(task.func, "__self__", None) is owner and (not job_ids or task.id in job_ids):
                    # The schedule's thread removes a task whose last run has begun, whoever holds our lock.
                    with suppress(JobLookupError):
                        self._scheduler.remove_job(task.id)

    def start(self) -> None:
        """Start the schedule; with `blocking`, return only when a `stop` from another thread is complete.

        After a stop the schedule goes on with its tasks: each that fell due in between runs once, at once.
        Raises RuntimeError when the scheduler is running, or when its last stop is not over yet.
        """
        with self._changing("start"):
            if not self.running and not self._drained.is_set():
                raise RuntimeError("can't start the scheduler: its last stop still waits for running tasks")
            if not self.running and self._looping:
                raise RuntimeError("can't start the scheduler: the start that was stopped has not returned yet")
            self._scheduler.start()
            self._closed = lifecycle.keep(self, self._scheduler)
            self._looping = self._blocking
            log.debug("scheduler_started")
        if self._blocking:
            try:
                self._scheduler.loop()
                self._drained.wait()
            except BaseException:  # Ctrl-C, say: from here on no thread keeps the schedule
                self.safe_stop(wait=False)
                raise
            finally:
                self._looping = False

    def pause(self) -> None:
        """Begin no further runs until `resume`; running tasks go on. Raises RuntimeError when not running."""
        with self._changing("pause"):
            self._scheduler.pause()
            log.debug("scheduler_paused")

    def resume(self) -> None:
        """End a pause: each task that fell due in it runs once, at once. Raises RuntimeError when not running."""
        with self._changing("resume"):
            self._scheduler.resume()
            log.debug("scheduler_resumed")

    def stop(self, wait: bool = True) -> None:
        """Begin no further runs and, with `wait`, return when no task is running. The tasks stay on the schedule.

        A run that waits for a free worker counts as running. Without `wait`, a task may run again after a new start
        while its old run goes on. Raises RuntimeError when not running, even while the stop of another thread still
        waits, and when a task asks to wait, since it would wait for itself.
        """
        if wait and hasattr(self._worker, "ours"):
            raise RuntimeError("can't stop the scheduler: a task can't wait for itself, use stop(wait=False)")
        with self._changing("stop"):
            if not self.running:
                raise SchedulerNotRunningError
            self._drained.clear()  # before the loop can end: a blocking start() then waits for it
            tasks = self._scheduler.halt()
            if self._closed is not None:
                self._closed()
            stopped_executor = self._executor
            self._renew(tasks)
        # Under no lock, ours or APScheduler's: a task that adds or removes one needs them before it can end.
        try:
            if wait:
                stopped_executor.shutdown(wait=True)
            log.debug("scheduler_stopped", waited=wait)
        finally:
            self._drained.set()

    def replace_worker(self) -> None:
        """Allow one more thread, in place of one that a task holds for ever."""
        with self._lock:
            pool = self._executor._pool  # noqa: SLF001 - neither library has a public way
            pool._max_workers += 1  # noqa: SLF001
            pool._adjust_thread_count()  # noqa: SLF001 - for a task that waits already

    def safe_start(self) -> int:
        """Do as `start`, but return `success` or `error`; a scheduler that runs already is a success."""
        return self._safely("start", self.start, harmless=SchedulerAlreadyRunningError)

    def safe_pause(self) -> int:
        """Do as `pause`, but return `success` or `error`."""
        return self._safely("pause", self.pause)

    def safe_resume(self) -> int:
        """Do as `resume`, but return `success` or `error`."""
        return self._safely("resume", self.resume)

    def safe_stop(self, wait: bool = True) -> int:
        """Do as `stop`, but return `success` or `error`; a scheduler that does not run is a success."""
        return self._safely("stop", lambda: self.stop(wait), harmless=SchedulerNotRunningError)

    def _put(
        self,
        func: Callable[..., object],
        schedule: BaseTrigger,
        *,
        replace_existing: bool = False,
        **options: Any,
    ) -> Job:
        with self._lock:
            if self._is_the_parents:
                raise ValueError(lifecycle.FORKED)
            job_id = options.get("id")
            same = self._scheduler.get_job(job_id) if job_id else None
            if same and not replace_existing:
                raise ValueError(f"the id {job_id!r} is taken; choose another, or give replace_existing=True")
            task = self._scheduler.add_job(func, schedule, replace_existing=replace_existing, **options)
            if same and same.pending:
                # Before the start APScheduler keeps both of them, and removes the older one first.
                self._scheduler.remove_job(job_id)
            return task

    def _new_executor(self) -> TaskThreads:
        mark = functools.partial(setattr, self._worker, "ours", True)
        return TaskThreads(
            self._max_workers,
            {"initializer": mark, "thread_name_prefix": "BackgroundTasks"},
        )

    def _renew(self, tasks: list[Job]) -> None:
        """Prepare a scheduler that was shut down for a new start: it has lost its workers and its jobs."""
        self._executor = self._new_executor()
        self._scheduler.remove_executor("default", shutdown=False)
        self._scheduler.add_executor(self._executor, "default")
        for task in tasks:
            self._scheduler.add_job(**{name: getattr(task, name) for name in _TASK_STATE})

    @contextmanager
    def _changing(self, action: str) -> Iterator[None]:
        """Allow one change of state at a time, and translate APScheduler's errors."""
        with self._lock:
            if self._is_the_parents:
                not_running = None if action == "start" else SchedulerNotRunningError()
                raise RuntimeError(f"can't {action} the scheduler: {lifecycle.FORKED}") from not_running
            try:
                yield
            except SchedulerAlreadyRunningError as error:
                raise RuntimeError(f"can't {action} the scheduler: it is running already") from error
            except SchedulerNotRunningError as error:
                raise RuntimeError(f"can't {action} the scheduler: it is not running") from error

    def _after_fork(self) -> None:
        """Replace, in a forked process, the locks that a thread may hold which does not exist here."""
        self._is_the_parents = self._is_the_parents or self._scheduler.running or self._looping
        self._lock = threading.RLock()
        self._drained = threading.Event()
        self._drained.set()
        self._looping = False
        self._scheduler.renew_locks()

    def _safely(
        self,
        action: str,
        change: Callable[[], None],
        harmless: type[Exception] | tuple[()] = (),
    ) -> int:
        try:
            change()
        except Exception as error:  # noqa: BLE001 - the safe methods promise to raise nothing
            if not isinstance(error.__cause__, harmless):
                log.error("scheduler_not_changed", action=action, reason=str(error))
                return self._error
        return self._success


def _log_event(event: JobEvent) -> None:
    log.debug(_DEBUG_EVENTS[event.code], task=event.job_id)


def _check_call(func: object, args: object, kwargs: object) -> None:
    """Refuse arguments that APScheduler would refuse too late, or would misunderstand."""
    if not callable(func):
        raise ValueError(f"expected a callable, got {func!r}")  # noqa: TRY004 - one kind of error for the caller
    if inspect.iscoroutinefunction(func):
        raise ValueError("a coroutine function would never run; wrap it in a function that calls asyncio.run")
    if args is not None and not isinstance(args, list | tuple):
        raise ValueError(f"args must be a list or a tuple, got {type(args).__name__}")
    if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs)):
        raise ValueError(f"kwargs must be a dict with names as keys, got {type(kwargs).__name__}")


def _make_trigger(trigger: object, options: dict[str, Any], zone: tzinfo) -> BaseTrigger:
    if isinstance(trigger, BaseTrigger):
        if options:
            raise ValueError(f"a trigger object takes no further options, got {', '.join(options)}")
        return trigger
    if not isinstance(trigger, str) or trigger not in _TRIGGERS:
        raise ValueError(f"expected the trigger interval, cron or date, or a trigger object, got {trigger!r}")
    known = inspect.signature(_TRIGGERS[trigger]).parameters
    if unknown := options.keys() - known.keys():
        raise ValueError(f"trigger {trigger} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    if options.get("jitter") is not None:
        _check_number("jitter", options["jitter"])
    if trigger == "interval":
        options = _with_interval(options)
    if trigger == "cron" and all(options.get(field) is None for field in CronTrigger.FIELD_NAMES):
        raise ValueError(
            "a cron trigger without any field would be due every second; give it second='*' if that is meant, or "
            f"one of {', '.join(CronTrigger.FIELD_NAMES)}"
        )
    return _TRIGGERS[trigger](**{"timezone": zone, **options})


def _with_interval(options: dict[str, Any]) -> dict[str, Any]:
    units = {name: options[name] for name in _INTERVAL_UNITS if name in options}
    units = units or {"seconds": _DEFAULT_INTERVAL_SECONDS}
    for name, value in units.items():
        _check_number(name, value)
    if not timedelta(**units):
        given = ", ".join(f"{name}={value}" for name, value in units.items())
        raise ValueError(f"an interval must be longer than 0, got {given}")
    return {**options, **units}


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number and not negative, got {value!r}")
