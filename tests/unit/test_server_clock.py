"""The database's clock decides, whatever this machine's clock shows."""

from datetime import UTC, datetime, timedelta, tzinfo

import pytest

from catfeeder_cron.schedule import IntervalSchedule
from catfeeder_cron.scheduler import server_clock
from catfeeder_cron.scheduler.server_clock import ClockWatch, ServerClock
from catfeeder_cron.scheduler.triggers import ScheduleTrigger
from catfeeder_cron.times import elapsed_seconds

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def clock(ahead: timedelta) -> ServerClock:
    """Return the clock of a machine that is this much ahead of its database."""
    clock = ServerClock()
    now = elapsed_seconds()
    clock.read(datetime.now(UTC) - ahead, now, now)
    return clock


def near(found: timedelta, expected: timedelta) -> bool:
    return abs(found - expected) < SECOND


def test_before_the_first_heartbeat_the_time_is_the_machines() -> None:
    assert near(ServerClock().now() - datetime.now(UTC), timedelta(0))
    assert ServerClock().correction() == timedelta(0)
    assert ServerClock().trouble == ""


@pytest.mark.parametrize("ahead", [-72 * HOUR, -HOUR, HOUR, 72 * HOUR])
def test_afterwards_it_is_the_databases(ahead: timedelta) -> None:
    assert near(clock(ahead).now() - datetime.now(UTC), -ahead)
    assert near(clock(ahead).correction(), -ahead)


def test_an_answer_that_was_long_on_its_way_moves_the_clock_no_further_than_it_proves() -> None:
    exact = clock(timedelta(0))
    now = elapsed_seconds()
    exact.read(datetime.now(UTC) - 20 * SECOND, now - 30, now)  # asked 30 s ago, answered 20 s ago
    assert exact.correction() == timedelta(0)
    exact.read(datetime.now(UTC) - 20 * SECOND, now - 10, now)  # 10 s at least lie between the clocks
    assert near(exact.correction(), -10 * SECOND)


def test_a_difference_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    wrong = clock(HOUR)
    for reached in (True, False, True):
        wrong.beat(reached)
    now = elapsed_seconds()
    wrong.read(datetime.now(UTC), now, now)
    wrong.beat(True)
    wrong.beat(True)
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("clock_differs")
    assert "this machine's clock is 1:00:00 ahead of the database's; jobs run by the database's" in first
    assert second.startswith("clock_agrees_again")


@pytest.mark.parametrize("ahead", [-HOUR, timedelta(0), HOUR])
def test_tasks_wait_by_the_machines_clock_for_the_databases_slots(ahead: timedelta) -> None:
    schedule = IntervalSchedule(timedelta(minutes=10), "job")
    trigger = ScheduleTrigger(schedule, "job", clock=clock(ahead))
    local = datetime.now(UTC)
    slot = schedule.next_after(local - ahead)
    fires = trigger.get_next_fire_time(None, local)
    assert fires
    assert near(fires - ahead - slot, timedelta(0))
    after = trigger.get_next_fire_time(fires, fires)
    assert after
    assert near(after - fires, timedelta(minutes=10)), "and for the slot after it next, though the correction drifts"


def test_a_clock_that_was_set_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Set(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + HOUR

    watch = ClockWatch(clock(timedelta(0)))
    assert not watch.was_set()
    monkeypatch.setattr(server_clock, "datetime", Set)
    assert watch.was_set()
    assert not watch.was_set()
