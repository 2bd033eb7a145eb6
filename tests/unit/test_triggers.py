"""A schedule as a trigger of APScheduler: no slot lost, none twice, whatever the clock does."""

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from apscheduler.schedulers.background import BackgroundScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from catfeeder_cron.schedule import CronSchedule, DateSchedule, IntervalSchedule, Schedule
from catfeeder_cron.schedule.crontab import Crontab
from catfeeder_cron.scheduler.triggers import ScheduleTrigger
from tests.support.waiting import SOON

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
PARIS = ZoneInfo("Europe/Paris")

schedules = st.sampled_from(
    [
        IntervalSchedule(timedelta(seconds=10), "x"),
        IntervalSchedule(timedelta(minutes=30), "x"),
        CronSchedule(Crontab.parse("*/5 * * * *"), PARIS),
        CronSchedule(Crontab.parse("15 3 * * mon-fri"), PARIS),
    ]
)
jitters = st.sampled_from([timedelta(0), timedelta(seconds=4), timedelta(minutes=3)])
triggers = st.builds(ScheduleTrigger, schedules, st.just("x"), jitters)
instants = st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))
lengths = st.timedeltas(timedelta(0), timedelta(hours=1))


def fire_times(trigger: ScheduleTrigger, now: datetime, count: int) -> list[datetime]:
    """List the next fire times when the scheduler is always on time."""
    times = []
    previous = None
    for _ in range(count):
        previous = trigger.get_next_fire_time(previous, now)
        assert previous is not None
        times.append(previous)
        now = previous
    return times


def slots(schedule: Schedule, instant: datetime, count: int) -> list[datetime]:
    found = []
    for _ in range(count):
        slot = schedule.next_after(instant)
        assert slot is not None
        found.append(slot)
        instant = slot
    return found


def test_it_fires_at_every_slot() -> None:
    schedule = IntervalSchedule(timedelta(seconds=10), "x")
    assert fire_times(ScheduleTrigger(schedule, "x"), NEW_YEAR, 100) == slots(schedule, NEW_YEAR, 100)


def test_a_trigger_that_starts_exactly_at_a_slot_fires_at_it() -> None:
    trigger = ScheduleTrigger(DateSchedule(NEW_YEAR), "x")
    assert trigger.get_next_fire_time(None, NEW_YEAR) == NEW_YEAR
    assert trigger.get_next_fire_time(None, NEW_YEAR + MICROSECOND) is None
    assert trigger.get_next_fire_time(NEW_YEAR, NEW_YEAR) is None


@pytest.mark.parametrize("jitter", [timedelta(seconds=4), timedelta(seconds=30)])
def test_the_delay_stays_within_the_jitter_and_before_the_next_slot(jitter: timedelta) -> None:
    schedule = IntervalSchedule(timedelta(seconds=10), "x")
    trigger = ScheduleTrigger(schedule, "x", jitter)
    expected = slots(schedule, NEW_YEAR, 500)
    delays = [trigger.fire_time(slot) - slot for slot in expected]
    limit = min(jitter, timedelta(seconds=10))
    assert min(delays) < limit / 20
    assert limit * 19 / 20 < max(delays) < limit


def test_the_delay_is_the_same_in_every_process_and_differs_from_job_to_job() -> None:
    delays = [
        ScheduleTrigger(DateSchedule(NEW_YEAR), job_id, timedelta(seconds=30)).fire_time(NEW_YEAR) - NEW_YEAR
        for job_id in ("clean-tokens", "renew-oauth")
    ]
    assert delays == [timedelta(seconds=29, microseconds=86575), timedelta(seconds=7, microseconds=212744)]


@settings(max_examples=50)
@given(schedules, jitters, instants)
def test_jitter_loses_no_slot_and_never_adds_up(schedule: Schedule, jitter: timedelta, start: datetime) -> None:
    trigger = ScheduleTrigger(schedule, "x", jitter)
    times = fire_times(trigger, start, 30)
    before = schedule.between(start - timedelta(days=7), times[0])
    assert before is not None
    assert times == [trigger.fire_time(slot) for slot in [before.last, *slots(schedule, before.last, 29)]]
    assert times == sorted(set(times))


@settings(max_examples=50)
@given(triggers, instants, lengths)
def test_after_a_sleep_the_scheduler_is_given_the_latest_missed_time_then_the_next(
    trigger: ScheduleTrigger, start: datetime, sleep: timedelta
) -> None:
    previous = fire_times(trigger, start, 1)[0]
    now = previous + sleep
    one_by_one = [previous]
    while one_by_one[-1] <= now:
        one_by_one += fire_times(trigger, one_by_one[-1] + MICROSECOND, 1)
    *due, following = one_by_one
    if len(due) > 1:
        assert trigger.get_next_fire_time(previous, now) == due[-1]
    assert trigger.get_next_fire_time(due[-1], now) == following


@settings(max_examples=50)
@given(triggers, instants, lengths)
def test_a_clock_that_was_set_back_runs_no_slot_again(
    trigger: ScheduleTrigger, start: datetime, back: timedelta
) -> None:
    previous, following = fire_times(trigger, start, 2)
    assert trigger.get_next_fire_time(previous, previous - back) == following


def test_a_year_of_sleep_costs_a_one_second_job_two_steps() -> None:
    trigger = ScheduleTrigger(IntervalSchedule(SECOND, "x"), "x", SECOND / 4)
    now = NEW_YEAR + timedelta(days=365)
    steps = 0
    fire_time = trigger.get_next_fire_time(None, NEW_YEAR)
    while fire_time is not None and fire_time <= now:
        fire_time = trigger.get_next_fire_time(fire_time, now)
        steps += 1
    assert steps == 2


def test_now_may_be_in_any_zone() -> None:
    trigger = ScheduleTrigger(IntervalSchedule(timedelta(minutes=10), "x"), "x", timedelta(minutes=5))
    repeated_hour = datetime(2026, 10, 25, 1, 5, tzinfo=UTC)
    assert fire_times(trigger, repeated_hour.astimezone(PARIS), 9) == fire_times(trigger, repeated_hour, 9)


@dataclass
class Recorder:
    """Takes down when it is called; `enough` is set after so many calls."""

    wanted: int
    times: list[datetime] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.times.append(datetime.now(UTC))
        if len(self.times) >= self.wanted:
            self.enough.set()


def test_apscheduler_runs_a_one_second_job_once_at_every_slot() -> None:
    schedule = IntervalSchedule(SECOND, "x")
    recorder = Recorder(wanted=3)
    scheduler = BackgroundScheduler(timezone=PARIS)
    started = datetime.now(UTC)
    scheduler.add_job(recorder, ScheduleTrigger(schedule, "x"), misfire_grace_time=None)
    scheduler.start()
    try:
        assert recorder.enough.wait(SOON)
    finally:
        scheduler.shutdown()
    expected = slots(schedule, started, 3)
    late = [ran - slot for ran, slot in zip(recorder.times, expected, strict=False)]
    assert all(timedelta(0) <= delay for delay in late), late


def test_apscheduler_coalesces_what_was_missed_while_it_was_paused_into_one_run() -> None:
    schedule = IntervalSchedule(SECOND, "x")
    recorder = Recorder(wanted=1)
    scheduler = BackgroundScheduler(timezone=UTC)
    scheduler.start(paused=True)
    try:
        scheduler.add_job(
            recorder,
            ScheduleTrigger(schedule, "x"),
            misfire_grace_time=None,
            coalesce=True,
            next_run_time=datetime.now(UTC) - timedelta(days=365),
        )
        scheduler.resume()
        assert recorder.enough.wait(SOON)
        recorder.wanted = 2
        recorder.enough.clear()
        assert recorder.enough.wait(SOON)
    finally:
        scheduler.shutdown()
    overdue, regular = recorder.times[:2]
    assert regular >= schedule.next_after(overdue)
