"""The slots of a job: on one grid for everyone, summed up without being listed."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catfeeder_cron.config import JobSettings
from catfeeder_cron.errors import ConfigurationError
from catfeeder_cron.schedule import (
    CronSchedule,
    DateSchedule,
    IntervalSchedule,
    Schedule,
    Slots,
    longest_gap,
)
from catfeeder_cron.schedule.crontab import Crontab

PARIS = ZoneInfo("Europe/Paris")
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

instants = st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))
intervals = st.timedeltas(timedelta(seconds=1), timedelta(days=60))


def listed(schedule: Schedule, after: datetime, until: datetime) -> Slots | None:
    """Sum up the slots in (`after`, `until`] by listing them."""
    slots = []
    slot = schedule.next_after(after)
    while slot is not None and slot <= until:
        slots.append(slot)
        slot = schedule.next_after(slot)
    return Slots(slots[0], slots[-1], len(slots)) if slots else None


@given(intervals, instants)
def test_the_slots_of_an_interval_are_one_interval_apart_to_the_microsecond(
    interval: timedelta, instant: datetime
) -> None:
    schedule = IntervalSchedule(interval, "clean-tokens")
    first = schedule.next_after(instant)
    assert instant < first <= instant + interval
    assert schedule.next_after(first) == first + interval
    assert schedule.next_after(first - MICROSECOND) == first


@given(intervals, instants, st.timedeltas(timedelta(0), timedelta(days=3650)))
def test_the_grid_of_an_interval_is_the_same_whenever_it_is_asked(
    interval: timedelta, instant: datetime, later: timedelta
) -> None:
    schedule = IntervalSchedule(interval, "clean-tokens")
    distance = schedule.next_after(instant + later) - schedule.next_after(instant)
    assert distance % interval == timedelta(0)


def test_jobs_of_one_interval_do_not_start_together() -> None:
    slots = {IntervalSchedule(timedelta(seconds=1), f"job-{n}").next_after(NEW_YEAR) for n in range(50)}
    assert len(slots) == 50
    assert max(slots) - min(slots) > timedelta(seconds=0.8)


def test_the_grid_is_the_same_in_every_process_and_every_version() -> None:
    slot = IntervalSchedule(timedelta(hours=1), "clean-tokens").next_after(NEW_YEAR)
    assert slot == NEW_YEAR + timedelta(minutes=12, seconds=50, microseconds=892920)


@pytest.mark.parametrize(
    "schedule",
    [
        IntervalSchedule(timedelta(minutes=7), "clean-tokens"),
        IntervalSchedule(timedelta(hours=5, microseconds=1), "clean-tokens"),
        CronSchedule(Crontab.parse("*/20 * * * *"), PARIS),
        CronSchedule(Crontab.parse("0,30 2 * * *"), PARIS),
        CronSchedule(Crontab.parse("15 3 13 * fri"), PARIS),
        CronSchedule(Crontab.parse("@yearly"), PARIS),
        DateSchedule(NEW_YEAR + timedelta(days=100)),
    ],
    ids=lambda schedule: schedule.describe(),
)
def test_the_sum_of_the_slots_is_that_of_listing_them(schedule: Schedule) -> None:
    around_the_spring_change = datetime(2026, 3, 29, 1, tzinfo=UTC)

    @settings(max_examples=30)
    @given(
        st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31), timezones=st.just(UTC))
        | st.timedeltas(-timedelta(hours=4), timedelta(hours=4)).map(lambda d: around_the_spring_change + d),
        st.timedeltas(timedelta(0), timedelta(days=12)) | st.timedeltas(timedelta(0), timedelta(hours=2)),
    )
    def sums_up_as_a_list_does(after: datetime, length: timedelta) -> None:
        assert schedule.between(after, after + length) == listed(schedule, after, after + length)

    sums_up_as_a_list_does()


@pytest.mark.parametrize(
    "schedule",
    [
        IntervalSchedule(timedelta(minutes=7), "clean-tokens"),
        CronSchedule(Crontab.parse("*/20 * * * *"), PARIS),
        DateSchedule(NEW_YEAR),
    ],
    ids=lambda schedule: schedule.describe(),
)
def test_an_interval_of_time_excludes_its_start_and_includes_its_end(schedule: Schedule) -> None:
    slot = schedule.next_after(NEW_YEAR - MICROSECOND)
    assert slot is not None
    assert schedule.between(slot - MICROSECOND, slot) == Slots(slot, slot, 1)
    assert schedule.between(slot, slot + MICROSECOND) is None
    assert schedule.between(slot - 2 * MICROSECOND, slot - MICROSECOND) is None
    assert schedule.between(slot, slot) is None


def test_hundreds_of_millions_of_slots_are_summed_up_exactly() -> None:
    ten_years_later = NEW_YEAR.replace(year=2036)
    every_second = IntervalSchedule(timedelta(seconds=1), "x").between(NEW_YEAR, ten_years_later)
    every_minute = CronSchedule(Crontab.parse("* * * * *"), PARIS).between(NEW_YEAR, ten_years_later)
    assert every_second is not None
    assert every_minute is not None
    assert every_second.count == (ten_years_later - NEW_YEAR) // timedelta(seconds=1)
    assert every_minute.count == (ten_years_later - NEW_YEAR) // timedelta(minutes=1)
    assert every_minute.last == ten_years_later


def test_a_sum_may_be_asked_for_in_any_zone() -> None:
    schedule = CronSchedule(Crontab.parse("0 * * * *"), PARIS)
    after, until = datetime(2026, 10, 25, tzinfo=UTC), datetime(2026, 10, 25, 3, tzinfo=UTC)
    assert schedule.between(after.astimezone(PARIS), until.astimezone(PARIS)) == schedule.between(after, until)


@pytest.mark.parametrize(
    ("schedule", "gap"),
    [
        (IntervalSchedule(timedelta(minutes=7), "x"), timedelta(minutes=7)),
        (CronSchedule(Crontab.parse("*/20 * * * *"), PARIS), timedelta(minutes=20)),
        (CronSchedule(Crontab.parse("*/15 9-17 * * mon-fri"), PARIS), timedelta(days=2, hours=15, minutes=15)),
        (CronSchedule(Crontab.parse("0 0 1 3 *"), PARIS), timedelta(days=365)),
        (DateSchedule(NEW_YEAR + timedelta(days=1)), None),
        (DateSchedule(NEW_YEAR - timedelta(days=1)), None),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else str(value),
)
def test_the_longest_gap_is_found_within_a_week(schedule: Schedule, gap: timedelta | None) -> None:
    assert longest_gap(schedule, NEW_YEAR) == gap


def test_a_date_has_one_slot() -> None:
    schedule = DateSchedule(NEW_YEAR)
    assert schedule.next_after(NEW_YEAR - MICROSECOND) == NEW_YEAR
    assert schedule.next_after(NEW_YEAR) is None


@pytest.mark.parametrize(
    ("table", "description", "first"),
    [
        ({"interval": 3600}, "every 1h", "2026-01-01T00:12:50.892920"),
        (
            {"cron": "15  3 * * mon-fri", "timezone": "Europe/Paris"},
            "cron 15 3 * * mon-fri (Europe/Paris)",
            "2026-01-01T02:15:00",
        ),
        ({"cron": "@daily"}, "cron @daily (America/New_York)", "2026-01-01T05:00:00"),
        (
            {"date": datetime(2026, 12, 24, 6, tzinfo=UTC)},
            "once at 2026-12-24T06:00:00Z",
            "2026-12-24T06:00:00",
        ),
    ],
)
def test_settings_become_a_schedule_that_says_what_they_say(
    table: dict[str, object], description: str, first: str
) -> None:
    schedule = JobSettings.model_validate(table).schedule("clean-tokens", ZoneInfo("America/New_York"))
    assert schedule.describe() == description
    assert schedule.next_after(NEW_YEAR) == datetime.fromisoformat(first).replace(tzinfo=UTC)


def test_settings_without_a_trigger_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"jobs\.x: got no trigger"):
        JobSettings().schedule("x", PARIS)
