import asyncio
import gc
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from apscheduler.schedulers import (
    SchedulerAlreadyRunningError,
    SchedulerNotRunningError,
)
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger

from catfeeder_cron.errors import UnknownJob
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.job_tasks import JobTasks
from tests.support.waiting import SOON, eventually

NOT_NOW = 0.2  # seconds in which something would have happened if it were going to


@pytest.fixture
def tasks() -> Iterator[BackgroundTasks]:
    with BackgroundTasks() as background_tasks:
        yield background_tasks


def nothing() -> None:
    pass


def interval_of(tasks: BackgroundTasks, **options: Any) -> timedelta:
    interval: timedelta = tasks.add_task(nothing, **options).trigger.interval
    return interval


class Gate:
    """A task that says that it has begun, and ends when it is let."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.open.wait(SOON)
        self.ended.set()


def in_thread(func: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=func, daemon=True)
    thread.start()
    return thread


# Adding tasks


def test_a_task_runs_again_and_again_with_its_arguments(tasks: BackgroundTasks) -> None:
    calls: list[tuple[int, str]] = []
    thrice = threading.Event()

    def task(number: int, *, word: str) -> None:
        calls.append((number, word))
        if len(calls) == 3:
            thrice.set()

    tasks.add_task(task, (1,), {"word": "meow"}, seconds=0.02)
    tasks.start()

    assert thrice.wait(SOON)
    assert set(calls) == {(1, "meow")}


def test_two_tasks_of_one_function_are_independent(tasks: BackgroundTasks) -> None:
    events = [threading.Event(), threading.Event()]
    kept, removed = (tasks.add_task(threading.Event.set, [event], seconds=0.02) for event in events)
    tasks.remove_task(removed.id)
    tasks.start()

    assert events[0].wait(SOON)
    assert not events[1].wait(NOT_NOW)
    assert tasks.tasks == [kept]


def test_five_seconds_are_the_interval_only_where_none_is_given(
    tasks: BackgroundTasks,
) -> None:
    assert interval_of(tasks) == timedelta(seconds=5)
    assert interval_of(tasks, seconds=2) == timedelta(seconds=2)
    assert interval_of(tasks, seconds=0.5) == timedelta(seconds=0.5)
    assert interval_of(tasks, minutes=1) == timedelta(seconds=60)
    assert interval_of(tasks, minutes=1, seconds=5) == timedelta(seconds=65)
    assert interval_of(tasks, hours=0, minutes=2) == timedelta(minutes=2)
    assert interval_of(tasks, weeks=1, days=1) == timedelta(days=8)


def test_cron_fields_are_read_in_the_scheduler_s_zone() -> None:
    tasks = BackgroundTasks(timezone="Asia/Kolkata")
    task = tasks.add_task(nothing, trigger="cron", hour=3, minute=15)
    due = task.trigger.get_next_fire_time(None, datetime(2026, 1, 1, tzinfo=UTC))

    assert due.astimezone(UTC) == datetime(2026, 1, 1, 21, 45, tzinfo=UTC)
    assert str(tasks.timezone) == "Asia/Kolkata"


def test_a_date_in_the_past_still_runs_once_and_then_is_no_task_any_more(
    tasks: BackgroundTasks,
) -> None:
    ran = threading.Event()
    tasks.add_task(ran.set, trigger="date", run_date=datetime(2020, 1, 1, tzinfo=UTC))
    tasks.start()

    assert ran.wait(SOON)
    tasks.stop()
    assert tasks.tasks == []


def test_a_trigger_object_is_taken_as_it_is(tasks: BackgroundTasks) -> None:
    trigger = IntervalTrigger(hours=7)
    assert tasks.add_task(nothing, trigger=trigger).trigger is trigger


def test_options_of_the_task_reach_apscheduler(tasks: BackgroundTasks) -> None:
    tasks.start()
    plain = tasks.add_task(nothing)
    assert (plain.misfire_grace_time, plain.coalesce, plain.max_instances) == (
        None,
        True,
        1,
    )

    task = tasks.add_task(
        nothing,
        id="feed",
        name="Feed",
        max_instances=3,
        coalesce=False,
        misfire_grace_time=9,
    )
    assert (
        task.id,
        task.name,
        task.max_instances,
        task.coalesce,
        task.misfire_grace_time,
    ) == (
        "feed",
        "Feed",
        3,
        False,
        9,
    )
    assert tasks.add_task(nothing, next_run_time=None).next_run_time is None


async def coroutine_function() -> None:
    pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"func": None}, "expected a callable, got None"),
        ({"func": "os:getpid"}, "expected a callable, got 'os:getpid'"),
        ({"func": coroutine_function}, "coroutine"),
        ({"args": "ab"}, "args must be a list or a tuple, got str"),
        ({"args": {1}}, "args must be a list or a tuple, got set"),
        ({"args": [1]}, "positional arguments"),
        ({"kwargs": [("a", 1)]}, "kwargs must be a dict with names as keys, got list"),
        ({"kwargs": {1: 2}}, "kwargs must be a dict with names as keys"),
        ({"kwargs": {"paw": 1}}, "paw"),
        (
            {"trigger": "sundial"},
            "expected the trigger interval, cron or date, or a trigger object, got 'sundial'",
        ),
        ({"trigger": None}, "expected the trigger interval, cron or date"),
        ({"trigger": IntervalTrigger}, "expected the trigger interval, cron or date"),
        (
            {"trigger": IntervalTrigger(hours=1), "minutes": 1},
            "takes no further options, got minutes",
        ),
        ({"second": 1}, "trigger interval has no option second; it has weeks"),
        (
            {"trigger": "cron", "seconds": 1},
            "trigger cron has no option seconds; it has year",
        ),
        (
            {"trigger": "date", "minutes": 1},
            "trigger date has no option minutes; it has run_date",
        ),
        ({"executor": "processpool"}, "no option executor"),
        ({"seconds": 0}, "an interval must be longer than 0, got seconds=0"),
        ({"minutes": 0}, "an interval must be longer than 0, got minutes=0"),
        ({"seconds": 1e-9}, "an interval must be longer than 0"),
        ({"seconds": -1}, "seconds must be a finite number and not negative, got -1"),
        ({"hours": 1, "minutes": -1}, "minutes must be a finite number"),
        ({"seconds": float("nan")}, "seconds must be a finite number"),
        ({"seconds": float("inf")}, "seconds must be a finite number"),
        ({"seconds": 10**400}, "too large"),
        ({"seconds": True}, "seconds must be a finite number"),
        ({"seconds": "5"}, "seconds must be a finite number"),
        ({"minutes": None}, "minutes must be a finite number"),
        ({"jitter": "much"}, "jitter must be a finite number"),
        ({"timezone": "Mars/Olympus"}, "Mars/Olympus"),
        ({"end_date": datetime(2020, 1, 1, tzinfo=UTC)}, "has no run ahead of it"),
        ({"trigger": "cron", "minute": 61}, "61"),
        ({"trigger": "cron"}, "a cron trigger without any field would be due every second"),
        ({"trigger": "cron", "timezone": "UTC", "minute": None}, "without any field"),
        ({"trigger": "cron", "month": 2, "day": 31}, "has no run ahead of it"),
        ({"trigger": "date", "run_date": "tomorrow"}, "date"),
        ({"id": 5}, "id must be"),
        ({"max_instances": 0}, "max_instances must be"),
        ({"next_run_time": "tomorrow"}, "date"),
    ],
)
def test_what_can_t_be_used_is_refused_in_one_line(
    tasks: BackgroundTasks,
    caplog: pytest.LogCaptureFixture,
    wrong: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(ValueError, match="can't add the task") as refused:
        tasks.add_task(**{"func": nothing, **wrong})

    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is not None
    assert tasks.safe_add_task(**{"func": nothing, **wrong}) == 84
    assert said in caplog.text
    assert tasks.tasks == []


@pytest.mark.parametrize("started", [False, True])
def test_an_id_is_taken_once_unless_the_task_is_to_be_replaced(tasks: BackgroundTasks, started: bool) -> None:
    if started:
        tasks.start()
    tasks.add_task(nothing, hours=1, id="feed")

    with pytest.raises(ValueError, match="the id 'feed' is taken"):
        tasks.add_task(nothing, hours=2, id="feed")
    with pytest.raises(ValueError, match="too large"):
        tasks.add_task(nothing, seconds=1e300, id="feed", replace_existing=True)
    assert [task.trigger.interval for task in tasks.tasks] == [timedelta(hours=1)]

    tasks.add_task(nothing, hours=3, id="feed", replace_existing=True)
    assert [task.trigger.interval for task in tasks.tasks] == [timedelta(hours=3)]


def test_a_safely_added_task_is_returned(tasks: BackgroundTasks) -> None:
    task = tasks.safe_add_task(nothing, id="feed")
    assert tasks.tasks == [task]


@pytest.mark.parametrize("started", [False, True])
def test_removing_an_unknown_task_names_it(tasks: BackgroundTasks, started: bool) -> None:
    if started:
        tasks.start()
    with pytest.raises(UnknownJob, match="'feed'"):
        tasks.remove_task("feed")


# Running tasks


class Unheard(BaseException):
    """Not an Exception, and none that Python knows."""


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, Unheard]
)
def test_a_task_that_raises_is_logged_with_its_traceback_and_everything_goes_on(
    caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    raised = threading.Semaphore(0)
    other_ran = threading.Event()

    def knock_the_bowl_over() -> None:
        raised.release()
        raise error("the bowl fell")

    with BackgroundTasks(max_workers=1) as tasks:
        tasks.add_task(knock_the_bowl_over, seconds=0.02)
        tasks.start()
        assert raised.acquire(timeout=SOON)
        assert raised.acquire(timeout=SOON)
        tasks.add_task(other_ran.set, trigger="date")
        assert other_ran.wait(SOON)

    record = next(r for r in caplog.records if r.levelno == logging.ERROR)
    assert record.exc_info
    assert record.exc_info[0] is error
    assert "in knock_the_bowl_over" in caplog.text


def skipped(caplog: pytest.LogCaptureFixture) -> int:
    return sum("maximum number of running instances" in record.getMessage() for record in caplog.records)


def test_a_task_that_is_still_running_is_not_run_a_second_time_and_that_is_told_once(
    tasks: BackgroundTasks, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    begun = threading.Semaphore(0)

    def task() -> None:
        begun.release()
        gate()

    tasks.add_task(task, seconds=0.02)
    tasks.start()

    assert begun.acquire(timeout=SOON)
    assert not begun.acquire(timeout=NOT_NOW)
    assert skipped(caplog) == 1
    gate.open.set()
    assert begun.acquire(timeout=SOON)


def test_a_job_whose_slots_the_ledger_accounts_for_is_not_told_as_skipped(
    tasks: BackgroundTasks, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    begun = threading.Semaphore(0)

    def call(_: str) -> None:
        begun.release()
        gate()

    job_tasks = JobTasks(tasks)
    job_tasks.run_soon("woken", call, "job")
    tasks.start()
    assert begun.acquire(timeout=SOON)
    job_tasks.run_soon("woken", call, "job")
    eventually(lambda: not tasks.tasks)

    assert not begun.acquire(timeout=NOT_NOW)
    assert skipped(caplog) == 0
    gate.open.set()


def test_a_cron_trigger_may_be_due_every_second_where_that_is_said(tasks: BackgroundTasks) -> None:
    trigger = tasks.add_task(nothing, trigger="cron", second="*").trigger
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert trigger.get_next_fire_time(now, now) == now + timedelta(seconds=1)


@pytest.fixture
def debug_records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Gives this package's debug records, and resets afterwards what asking for them changes."""
    caplog.set_level(logging.NOTSET, logger="catfeeder_cron")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("catfeeder_cron") and record.levelno == logging.DEBUG
    ]


def test_debug_logs_each_change_of_state(debug_records: Callable[[], list[str]]) -> None:
    tasks = BackgroundTasks(debug=True)
    assert tasks.debug
    for change in (tasks.start, tasks.pause, tasks.resume, tasks.stop):
        change()
    assert [record.split()[0] for record in debug_records()] == [
        "scheduler_started",
        "scheduler_paused",
        "scheduler_resumed",
        "scheduler_stopped",
    ]


def test_debug_logs_what_becomes_of_a_task(debug_records: Callable[[], list[str]]) -> None:
    def raise_it() -> None:
        raise LookupError

    def is_told(event: str, task: str) -> bool:
        return any(event in message and task in message for message in debug_records())

    with BackgroundTasks(debug=True) as tasks:
        tasks.add_task(nothing, trigger="date", id="calm")
        tasks.add_task(raise_it, trigger="date", id="wild")
        tasks.start()
        for event, task in [
            ("task_added", "calm"),
            ("task_submitted", "calm"),
            ("task_finished", "calm"),
            ("task_failed", "wild"),
        ]:
            eventually(partial(is_told, event, task), event)


@pytest.mark.parametrize("blocking", [False, True])
def test_the_schedule_is_looked_at_once_a_minute_whatever_the_next_run_is(
    monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    sleeps: list[float | None] = []
    asleep = threading.Event()

    class RecordingEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if not self.is_set():
                sleeps.append(timeout)
                asleep.set()
            return super().wait(timeout)

    # A wait goes by a clock that stands still in a suspended machine, so its length is what counts.
    monkeypatch.setattr("apscheduler.schedulers.background.Event", RecordingEvent)
    monkeypatch.setattr("apscheduler.schedulers.blocking.Event", RecordingEvent)
    with BackgroundTasks(blocking=blocking) as tasks:
        thread = in_thread(tasks.start)
        assert asleep.wait(SOON)
        asleep.clear()
        tasks.add_task(nothing, hours=5)
        assert asleep.wait(SOON)
        asleep.clear()
        tasks.pause()
        tasks.add_task(nothing, hours=6)  # wakes the loop up
        tasks.resume()
        assert asleep.wait(SOON)
    thread.join(SOON)

    assert all(seconds is not None and seconds <= 60 for seconds in sleeps), sleeps


# Life cycle


def test_states_that_don_t_allow_it_raise_with_apscheduler_s_error_as_cause(
    tasks: BackgroundTasks,
) -> None:
    for change in (tasks.pause, tasks.resume, tasks.stop):
        with pytest.raises(RuntimeError, match="not running") as refused:
            change()
        assert isinstance(refused.value.__cause__, SchedulerNotRunningError)

    tasks.start()
    with pytest.raises(RuntimeError, match="running already") as refused:
        tasks.start()
    assert isinstance(refused.value.__cause__, SchedulerAlreadyRunningError)


def test_the_safe_ones_return_the_codes_and_log_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = BackgroundTasks(success=10, error=20)

    assert tasks.safe_stop() == 10
    assert not caplog.records
    assert tasks.safe_pause() == 20
    assert tasks.safe_resume() == 20
    assert "can't pause the scheduler: it is not running" in caplog.text
    assert tasks.safe_add_task(nothing, seconds=0) == 20

    assert [tasks.safe_start(), tasks.safe_start()] == [10, 10]
    assert tasks.running
    assert [tasks.safe_pause(), tasks.safe_pause(), tasks.safe_resume()] == [10, 10, 10]
    assert [tasks.safe_stop(), tasks.safe_stop(wait=False)] == [10, 10]
    assert not tasks.running


def test_the_codes_and_debug_can_be_read_and_not_changed() -> None:
    tasks = BackgroundTasks(success=10, error=20)
    assert (tasks.success, tasks.error, tasks.debug) == (10, 20, False)
    assert (BackgroundTasks().success, BackgroundTasks().error) == (0, 84)
    for name in ("success", "error", "debug"):
        with pytest.raises(AttributeError):
            setattr(tasks, name, 1)


def test_the_codes_are_0_and_84_by_default() -> None:
    tasks = BackgroundTasks()
    assert tasks.safe_pause() == 84
    assert tasks.safe_start() == 0
    assert tasks.safe_stop() == 0


def test_a_pause_holds_runs_back_until_it_ends(tasks: BackgroundTasks) -> None:
    ran = threading.Event()
    tasks.start()
    tasks.pause()
    tasks.add_task(ran.set, trigger="date")

    assert tasks.running
    assert not ran.wait(NOT_NOW)
    tasks.resume()
    assert ran.wait(SOON)


def test_stop_waits_for_running_tasks(tasks: BackgroundTasks) -> None:
    gate = Gate()
    tasks.add_task(gate, trigger="date")
    tasks.start()
    assert gate.begun.wait(SOON)
    stopping = in_thread(tasks.stop)

    stopping.join(NOT_NOW)
    assert stopping.is_alive()
    with pytest.raises(RuntimeError, match="its last stop still waits"):
        tasks.start()
    assert tasks.safe_start() == 84

    gate.open.set()
    stopping.join(SOON)
    assert gate.ended.is_set()


class SlowEvent(threading.Event):
    """One that lets a scheduler's loop notice late that it was woken up."""

    def wait(self, timeout: float | None = None) -> bool:
        is_set = super().wait(timeout)
        time.sleep(NOT_NOW)
        return is_set


def test_no_thread_is_left_when_stop_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apscheduler.schedulers.background.Event", SlowEvent)
    before = set(threading.enumerate())
    ran = threading.Event()
    tasks = BackgroundTasks()
    tasks.add_task(ran.set, trigger="date")
    tasks.start()
    assert ran.wait(SOON)
    tasks.stop()

    assert set(threading.enumerate()) <= before


def test_stop_without_waiting_leaves_tasks_running(tasks: BackgroundTasks) -> None:
    gate = Gate()
    tasks.add_task(gate, trigger="date")
    tasks.start()
    assert gate.begun.wait(SOON)

    tasks.stop(wait=False)
    assert not tasks.running
    assert not gate.ended.is_set()
    gate.open.set()
    assert gate.ended.wait(SOON)


def test_a_task_may_use_the_schedule_while_stop_waits_for_it(
    tasks: BackgroundTasks,
) -> None:
    gate = Gate()

    def task() -> None:
        gate()
        tasks.add_task(nothing, id="new")
        tasks.remove_task("old")

    tasks.add_task(nothing, id="old")
    tasks.add_task(task, trigger="date")
    tasks.start()
    assert gate.begun.wait(SOON)
    stopping = in_thread(tasks.stop)
    stopping.join(NOT_NOW)
    gate.open.set()
    stopping.join(SOON)

    assert not stopping.is_alive()
    assert [task.id for task in tasks.tasks] == ["new"]


@pytest.mark.parametrize("blocking", [False, True])
def test_a_task_may_stop_the_scheduler_but_not_wait_for_itself(blocking: bool) -> None:
    tasks = BackgroundTasks(blocking=blocking)
    said: list[object] = []
    stopped = threading.Event()

    def task() -> None:
        try:
            tasks.stop()
        except RuntimeError as error:
            said.append(str(error))
        said.append(tasks.running)
        said.append(tasks.safe_stop())
        tasks.stop(wait=False)
        stopped.set()

    tasks.add_task(task, trigger="date")
    starting = in_thread(tasks.start)

    assert stopped.wait(SOON)
    starting.join(SOON)
    assert not starting.is_alive()
    assert not tasks.running
    assert said == [
        "can't stop the scheduler: a task can't wait for itself, use stop(wait=False)",
        True,
        84,
    ]


def test_a_blocking_start_returns_when_stop_is_complete_and_not_before() -> None:
    tasks = BackgroundTasks(blocking=True)
    gate = Gate()
    tasks.add_task(gate, trigger="date")
    starting = in_thread(tasks.start)
    assert gate.begun.wait(SOON)
    assert tasks.safe_start() == 0
    stopping = in_thread(tasks.stop)

    starting.join(NOT_NOW)
    assert starting.is_alive()
    gate.open.set()
    starting.join(SOON)
    assert not starting.is_alive()
    assert gate.ended.is_set()
    stopping.join(SOON)


def test_a_blocking_start_is_refused_while_the_one_before_has_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apscheduler.schedulers.blocking.Event", SlowEvent)
    tasks = BackgroundTasks(blocking=True)
    ran = threading.Event()
    tasks.add_task(ran.set, trigger="date")
    starting = in_thread(tasks.start)
    assert ran.wait(SOON)
    tasks.stop()

    with pytest.raises(RuntimeError, match="has not returned"):
        tasks.start()
    starting.join(SOON)
    assert not starting.is_alive()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_stopped_scheduler_starts_again_with_the_tasks_that_it_had(
    blocking: bool,
) -> None:
    tasks = BackgroundTasks(blocking=blocking)
    ran = threading.Event()
    tasks.add_task(ran.set, seconds=0.02, id="often")
    held_back = datetime.now(UTC) + timedelta(days=9)
    tasks.add_task(nothing, hours=2, id="later", max_instances=7, next_run_time=held_back)
    tasks.add_task(nothing, id="paused", next_run_time=None)

    for _ in range(2):
        ran.clear()
        starting = in_thread(tasks.start)
        assert ran.wait(SOON)
        tasks.stop()
        starting.join(SOON)
        assert not starting.is_alive()

    kept = {task.id: task for task in tasks.tasks}
    assert set(kept) == {"often", "later", "paused"}
    assert kept["later"].next_run_time == held_back
    assert kept["later"].max_instances == 7
    assert kept["paused"].next_run_time is None
    with pytest.raises(ValueError, match="the id 'often' is taken"):
        tasks.add_task(nothing, id="often")


class Faulty(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Due at once, and then not to be asked again."""

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime | None:
        if previous is not None:
            raise LookupError("no calendar")
        return now


def test_an_interrupt_in_a_blocking_start_stops_the_schedule() -> None:
    tasks = BackgroundTasks(blocking=True)
    threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tasks.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not tasks.running
    threading.Timer(0.2, tasks.stop).start()
    tasks.start()
    assert not tasks.running


def test_a_trigger_that_raises_ends_the_schedule_for_no_other_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("catfeeder_cron.scheduler.haltable._AFTER_FAILURE_SECONDS", 0.01)
    ran = threading.Event()
    with BackgroundTasks() as tasks:
        tasks.add_task(nothing, trigger=Faulty(), id="faulty")
        tasks.start()
        eventually(lambda: "due_tasks_not_found" in caplog.text)
        tasks.remove_task("faulty")
        tasks.add_task(ran.set, trigger="date")
        assert ran.wait(SOON)
    assert "LookupError: no calendar" in caplog.text


def test_what_is_told_of_each_turn_may_raise(caplog: pytest.LogCaptureFixture) -> None:
    ran = threading.Event()

    def on_turn() -> None:
        raise LookupError

    with BackgroundTasks() as tasks:
        tasks.on_turn(on_turn)
        tasks.add_task(ran.set, seconds=0.02)
        tasks.start()
        assert ran.wait(SOON)
    assert "on_turn_failed" in caplog.text


class OneRun(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Due at once, and slow to say that there is no further run."""

    def __init__(self) -> None:
        self.asked_for_more = threading.Event()
        self.answer = threading.Event()

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime | None:
        if previous is None:
            return now
        self.asked_for_more.set()
        self.was_answered = self.answer.wait(SOON)
        return None


@pytest.mark.parametrize("blocking", [False, True])
def test_a_stop_while_the_last_run_of_a_task_is_submitted_neither_fails_nor_repeats_it(
    blocking: bool,
) -> None:
    tasks = BackgroundTasks(blocking=blocking)
    trigger = OneRun()
    runs: list[None] = []
    tasks.add_task(lambda: runs.append(None), trigger=trigger)
    starting = in_thread(tasks.start)
    assert trigger.asked_for_more.wait(SOON)
    stopping = in_thread(tasks.stop)
    stopping.join(NOT_NOW)
    trigger.answer.set()

    stopping.join(SOON)
    starting.join(SOON)  # an error in it would be a warning, and so a failure
    assert not tasks.running
    assert tasks.tasks == []
    assert runs == [None]


def test_entering_doesn_t_start_and_leaving_stops_and_waits() -> None:
    gate = Gate()
    gate.open.set()
    with BackgroundTasks() as tasks:
        assert not tasks.running
        tasks.add_task(gate, trigger="date")
        tasks.start()
        assert gate.begun.wait(SOON)
    assert gate.ended.is_set()
    assert not tasks.running

    with BackgroundTasks():
        pass


def test_leaving_waits_for_a_stop_that_another_thread_has_begun() -> None:
    gate = Gate()

    def leave() -> None:
        with background_tasks:
            pass

    background_tasks = BackgroundTasks()
    background_tasks.add_task(gate, trigger="date")
    background_tasks.start()
    assert gate.begun.wait(SOON)
    in_thread(background_tasks.stop).join(NOT_NOW)
    leaving = in_thread(leave)
    leaving.join(NOT_NOW)
    assert leaving.is_alive()
    gate.open.set()
    leaving.join(SOON)
    assert not leaving.is_alive()


def threads_ended(threads: set[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(SOON)
    return not any(thread.is_alive() for thread in threads)


def test_a_dropped_object_shuts_its_scheduler_down() -> None:
    before = set(threading.enumerate())
    ran = threading.Event()
    tasks = BackgroundTasks()
    tasks.add_task(ran.set, seconds=0.02)
    tasks.start()
    assert ran.wait(SOON)
    threads = set(threading.enumerate()) - before
    assert threads
    gone = weakref.ref(tasks)

    del tasks
    gc.collect()

    assert gone() is None
    assert threads_ended(threads)


def test_a_task_that_holds_the_last_reference_shuts_the_scheduler_down_in_the_end() -> None:
    """The scheduler is then shut down by one of its own threads, which must not wait for itself."""
    before = set(threading.enumerate())
    gate = Gate()
    tasks = BackgroundTasks()
    tasks.add_task(lambda _: gate(), [tasks], trigger="date")
    tasks.start()
    assert gate.begun.wait(SOON)
    threads = set(threading.enumerate()) - before

    del tasks
    gate.open.set()

    assert threads_ended(threads)


def test_a_drop_does_not_wait_for_what_the_scheduler_is_about() -> None:
    """It may happen under a lock that the scheduler's thread, here in a trigger of one's own, is waiting for."""
    before = set(threading.enumerate())
    tasks = BackgroundTasks()
    trigger = OneRun()
    tasks.add_task(nothing, trigger=trigger)
    tasks.start()
    assert trigger.asked_for_more.wait(SOON)
    threads = set(threading.enumerate()) - before

    del tasks
    gc.collect()
    trigger.answer.set()

    assert threads_ended(threads)
    assert trigger.was_answered


def test_objects_that_were_stopped_are_not_remembered() -> None:
    for _ in range(3):
        tasks = BackgroundTasks()
        for _ in range(2):
            tasks.start()
            tasks.stop()
    gone = weakref.ref(tasks._scheduler)
    del tasks
    gc.collect()
    assert gone() is None


def run_program(source: str) -> "subprocess.CompletedProcess[str]":
    # Python warns of forks where there are threads, which is what these programs are about.
    options = ["-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    return subprocess.run(
        [sys.executable, *options, "-c", source], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("start", ["tasks.start()", "threading.Thread(target=tasks.start).start()"])
def test_a_program_that_ends_while_a_task_runs_waits_for_it_and_prints_nothing(start: str) -> None:
    """Other tasks come due meanwhile, for which there is no worker any more."""
    source = f"""
import logging, threading, time
from catfeeder_cron import BackgroundTasks

logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a busy machine passes runs over, and APScheduler tells
begun = threading.Event()

def long():
    begun.set()
    threading.main_thread().join(timeout=1)
    print("done", flush=True)

tasks = BackgroundTasks(blocking="Thread" in {start!r})
tasks.add_task(long, trigger="date")
tasks.add_task(lambda: None, seconds=0.1)
{start}
assert begun.wait(60)
"""
    ended = run_program(source)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


FORKED = """
import os, sys, threading
from catfeeder_cron import BackgroundTasks

ran, held = threading.Event(), threading.Event()
started, fresh = BackgroundTasks(), BackgroundTasks()
started.add_task(lambda: None, seconds=0.05)
started.start()
fresh.add_task(ran.set, seconds=0.05)

def hold():
    with started._lock, fresh._lock, started._scheduler._turn, fresh._scheduler._jobstores_lock:
        held.set()
        done.wait()

done = threading.Event()
holder = threading.Thread(target=hold)
holder.start()
assert held.wait(60)
child = os.fork()
if child == 0:
    print(started.running, started.tasks, started.safe_start(), started.safe_pause(), started.safe_add_task(print))
    print(started.safe_stop(), started.safe_stop(wait=False))
    with started:
        pass
    del started
    print(fresh.running, fresh.safe_start(), ran.wait(60), fresh.safe_stop(), flush=True)
    sys.exit()
_, status = os.waitpid(child, 0)
done.set()
holder.join()
print(status, started.running, started.safe_stop(), flush=True)
"""


def test_after_a_fork_what_the_parent_has_started_does_not_run_in_the_child_and_says_so() -> None:
    """Also where another thread held every lock at that moment. What was only made before is started as usual."""
    ended = run_program(FORKED)
    assert ended.stdout.splitlines() == ["False [] 84 84 84", "0 0", "False 0 True 0", "0 True 0"]
    assert ended.returncode == 0
    reason = "it was in use before this process was forked, and lives on in the parent alone"
    assert f"can't start the scheduler: {reason}; make a new one after the fork" in ended.stderr
    assert ended.stderr.count(reason) == 3
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("ending", ["", "raise SystemExit", "del tasks"])
def test_a_program_that_never_stops_its_tasks_ends_nevertheless(ending: str) -> None:
    program = f"""
import threading, time
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
begun = threading.Event()
def task():
    begun.set()
    time.sleep(0.2)
    print("done", flush=True)
tasks = BackgroundTasks()
tasks.add_task(task, trigger="date")
tasks.add_task(print, hours=1)
tasks.start()
begun.wait()
{ending}
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_it_can_t_be_subclassed() -> None:
    with pytest.raises(TypeError, match="final"):

        class Mine(BackgroundTasks):  # type: ignore[misc]
            pass
