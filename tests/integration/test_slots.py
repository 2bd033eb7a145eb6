"""From slots to runs: what is due, what went by and why, each slot accounted for once whoever steps in when."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import DatabaseUnavailable
from catfeeder_cron.ledger import MOVED, NO_DAEMON, NO_DATABASE, NOT_FREE, STILL_RUNNING, WENT_BACK, Ledger, Process
from catfeeder_cron.schedule import IntervalSchedule, Schedule
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.slots import JobSlots
from catfeeder_cron.scheduler.triggers import ScheduleTrigger
from tests.integration.daemons import SECOND, report, rows

MINUTE = timedelta(minutes=1)
SCHEDULE = IntervalSchedule(MINUTE, "job")
# A slot of long ago, so that no clock of these tests gets ahead of the server's.
START = SCHEDULE.next_after(datetime.now(UTC) - timedelta(days=1))


class Daemon:
    """One process's view of the job, with a clock that is set by hand."""

    def __init__(self, database: Database, schedule: Schedule, jitter: timedelta, shared: bool) -> None:
        self.now = START
        self.downtime = Downtime(START)
        self.ledger = Ledger(database, Process("daemon"))
        trigger = ScheduleTrigger(schedule, "job", jitter)
        self.slots = JobSlots("job", schedule, trigger, shared, self.ledger, self.downtime, clock=lambda: self.now)
        self.slots.accounted_until = START

    def at(self, now: datetime) -> "Daemon":
        self.now = now
        return self

    def claim(self) -> int | None:
        return self.slots.claim("schedule")


@pytest.fixture
def hire(with_schema: None, database: Database, admin: psycopg.Connection) -> Callable[..., Daemon]:
    """Makes a daemon that knows the account of a job with a slot every minute to stand at START."""

    def one(
        database: Database = database,
        schedule: Schedule = SCHEDULE,
        jitter: timedelta = timedelta(0),
        *,
        shared: bool = False,
    ) -> Daemon:
        daemon = Daemon(database, schedule, jitter, shared)
        daemon.downtime.seen(START)
        admin.execute(
            "INSERT INTO catfeeder_cron.schedule VALUES ('job', %s, %s) ON CONFLICT DO NOTHING",
            [schedule.describe(), START],
        )
        return daemon

    return one


def test_a_slot_is_due_from_its_instant_on_and_once(hire: Callable[..., Daemon], admin: psycopg.Connection) -> None:
    daemon = hire()
    assert daemon.at(START + MINUTE - timedelta(microseconds=1)).claim() is None
    run_id = daemon.at(START + MINUTE).claim()
    assert run_id
    daemon.ledger.close(run_id, report())
    assert daemon.at(START + MINUTE + 59 * SECOND).claim() is None
    assert rows(admin, "slot") == [(START + MINUTE,)]


def test_before_its_account_is_open_a_job_has_no_slot_that_is_due(hire: Callable[..., Daemon]) -> None:
    daemon = hire()
    daemon.slots.accounted_until = None
    assert daemon.at(START + 10 * MINUTE).claim() is None


def test_a_slot_with_jitter_is_due_from_its_delayed_instant_on_restart_or_not(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    jitter = 25 * SECOND
    fire_time = ScheduleTrigger(SCHEDULE, "job", jitter).fire_time(START + 2 * MINUTE)
    assert fire_time > START + 2 * MINUTE
    daemon = hire(jitter=jitter)

    # Between the slot and its delayed instant the slot before it is the one that is due, as after a restart.
    run_id = daemon.at(fire_time - timedelta(microseconds=1)).claim()
    assert run_id
    daemon.ledger.close(run_id, report())
    assert daemon.claim() is None
    assert daemon.at(fire_time).claim()
    assert rows(admin, "slot") == [(START + MINUTE,), (START + 2 * MINUTE,)]


def test_the_latest_slot_runs_and_those_before_it_are_missed(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    assert daemon.at(START + 5 * MINUTE + SECOND).claim()
    assert rows(admin, "slot, last_slot, missed, reason") == [
        (START + MINUTE, START + 4 * MINUTE, 4, NOT_FREE),
        (START + 5 * MINUTE, None, None, None),
    ]


def test_slots_are_told_apart_by_what_the_daemon_knows_of_their_time(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    downtime = daemon.downtime
    downtime.seen(START + 3.5 * MINUTE)  # nothing heard of itself for more than 30 s: frozen
    downtime.seen(START + 3.9 * MINUTE)
    downtime.missed()
    downtime.missed()
    downtime.seen(START + 6.5 * MINUTE)
    assert daemon.at(START + 8 * MINUTE).claim()

    assert rows(admin, "slot, missed, reason") == [
        (START + MINUTE, 3, NO_DAEMON),
        (START + 4 * MINUTE, 3, NO_DATABASE),
        (START + 7 * MINUTE, 1, NOT_FREE),
        (START + 8 * MINUTE, None, None),
    ]


def test_a_claim_that_is_itself_the_end_of_an_outage_knows_of_it(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    daemon.downtime.missed()
    assert daemon.at(START + 3 * MINUTE).claim()
    assert rows(admin, "missed, reason", "missed IS NOT NULL") == [(2, NO_DATABASE)]
    assert daemon.downtime.returns == 2


def test_a_daemon_that_starts_without_a_database_tells_its_absence_from_that_of_the_database(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    daemon.downtime = daemon.slots.downtime = Downtime(START + 2.5 * MINUTE)
    daemon.downtime.missed()
    daemon.downtime.seen(START + 4.5 * MINUTE)
    daemon.at(START + 4.5 * MINUTE).slots.pass_over()
    assert rows(admin, "slot, missed, reason") == [
        (START + MINUTE, 2, NO_DAEMON),
        (START + 3 * MINUTE, 2, NO_DATABASE),
    ]


def test_what_is_passed_over_is_missed_to_the_last_slot_and_runs_no_more(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    daemon.at(START + 3 * MINUTE).slots.pass_over(STILL_RUNNING)
    assert daemon.claim() is None
    assert rows(admin, "slot, last_slot, missed, reason") == [(START + MINUTE, START + 3 * MINUTE, 3, STILL_RUNNING)]


def test_a_clock_that_is_put_back_runs_no_slot_again(hire: Callable[..., Daemon], admin: psycopg.Connection) -> None:
    daemon = hire()
    run_id = daemon.at(START + 10 * MINUTE).claim()
    assert run_id
    daemon.ledger.close(run_id, report())
    for minute in (5, 9, 10):
        assert daemon.at(START + minute * MINUTE).claim() is None
    assert daemon.at(START + 11 * MINUTE).claim()


@pytest.mark.parametrize("minutes", [2, 50, 120, 4320])
def test_a_clock_that_is_ahead_takes_nothing(
    hire: Callable[..., Daemon], admin: psycopg.Connection, minutes: int
) -> None:
    daemon = hire()
    assert daemon.at(datetime.now(UTC) + minutes * MINUTE).claim() is None
    assert rows(admin, "*") == []


def go_back(admin: psycopg.Connection, minutes: int) -> None:
    """Have the server lose all that it was told of the slots after this one."""
    admin.execute("UPDATE catfeeder_cron.schedule SET accounted_until = %s", [START + minutes * MINUTE])
    admin.execute("DELETE FROM catfeeder_cron.job_runs WHERE slot > %s", [START + minutes * MINUTE])


@pytest.mark.parametrize("told_by", ["claim", "heartbeat"])
def test_a_slot_that_this_process_has_run_is_not_run_again_after_the_ledger_went_back(
    hire: Callable[..., Daemon], admin: psycopg.Connection, told_by: str
) -> None:
    daemon = hire()
    for minute in (1, 2, 3, 5):
        run_id = daemon.at(START + minute * MINUTE).claim()
        assert run_id
        daemon.ledger.close(run_id, report())
    go_back(admin, 2)
    if told_by == "heartbeat":
        daemon.slots.open(START + 2 * MINUTE)
        assert daemon.slots.accounted_until == START + 5 * MINUTE
        assert daemon.claim() is None

    assert daemon.at(START + 6 * MINUTE).claim()

    # Slots 3 and 5 ran: the supervisor records these runs anew. No stretch of lost slots goes over them.
    assert rows(admin, "slot, missed, reason", f"slot > '{START + 2 * MINUTE}'") == [
        (START + 4 * MINUTE, 1, WENT_BACK),
        (START + 6 * MINUTE, None, None),
    ]


def test_what_this_process_knows_outlives_an_outage_while_it_makes_up_for_lost_slots(
    hire: Callable[..., Daemon], admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = hire()
    run_id = daemon.at(START + 3 * MINUTE).claim()
    assert run_id
    daemon.ledger.close(run_id, report())
    go_back(admin, 0)

    def unreachable(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.ledger, "claim", unreachable)
        with pytest.raises(DatabaseUnavailable):
            daemon.slots.open(START)
    assert daemon.slots.accounted_until == START + 3 * MINUTE
    assert daemon.claim() is None


def test_no_stretch_of_lost_slots_grows_over_one_that_ran(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    first, second = hire(), hire()
    for daemon, minute in ((first, 2), (second, 3), (first, 4)):
        run_id = daemon.at(START + minute * MINUTE).claim()
        assert run_id
        daemon.ledger.close(run_id, report())
    second.slots.accounted_until = START + 3 * MINUTE
    go_back(admin, 0)
    second.at(START + 4 * MINUTE).slots.open(START)  # knows that 3 ran, and that 1 and 2 were accounted for
    first.at(START + 4 * MINUTE).slots.open(START + 3 * MINUTE)
    first.slots.open(START + 3 * MINUTE)
    assert first.at(START + 5 * MINUTE).claim()
    assert rows(admin, "slot, missed, reason") == [
        (START + MINUTE, 2, WENT_BACK),
        (START + 5 * MINUTE, None, None),
    ]


def test_what_several_processes_know_after_the_ledger_went_back_adds_up(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemons = [hire() for _ in range(3)]
    for minute in range(1, 10):
        daemon = daemons[minute % 3].at(START + minute * MINUTE)
        run_id = daemon.claim()
        assert run_id
        daemon.ledger.close(run_id, report())
    go_back(admin, 1)
    assert [daemon.at(START + 10 * MINUTE).claim() is not None for daemon in daemons] == [True, False, False]
    found = rows(admin, "slot, coalesce(missed, 1)", f"slot > '{START + MINUTE}'")
    recorded = [slot + number * MINUTE for slot, slots in found for number in range(slots)]
    made = [slot for daemon in daemons for slot in daemon.slots._claimed if START + MINUTE < slot < START + 10 * MINUTE]
    assert sorted({*recorded, *made}) == [START + minute * MINUTE for minute in range(2, 11)]


def test_an_account_in_the_future_that_a_wrong_clock_left_behind_counts_for_nothing(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    daemon.slots.accounted_until = START + 60 * MINUTE
    daemon.at(START + 5 * MINUTE).slots.open(START + 4 * MINUTE)
    assert daemon.slots.accounted_until == START + 4 * MINUTE


def test_slots_that_wait_because_the_database_moved_say_so(
    hire: Callable[..., Daemon], admin: psycopg.Connection
) -> None:
    daemon = hire()
    admin.execute("UPDATE catfeeder_cron.lineage SET reason = 'moved', since = now()")
    for seconds in (60, 70):
        daemon.downtime.seen(START + (seconds - 20) * SECOND)
        assert daemon.at(START + seconds * SECOND).claim() is None
        assert daemon.slots.must_wait()
        assert daemon.slots.must_wait() is None
    admin.execute("UPDATE catfeeder_cron.lineage SET reason = NULL")
    daemon.downtime.seen(START + 100 * SECOND)
    assert daemon.at(START + 120 * SECOND).claim()
    assert rows(admin, "slot, missed, reason") == [(START + MINUTE, 1, MOVED), (START + 2 * MINUTE, None, None)]


def test_a_move_after_an_outage_begins_where_that_ends() -> None:
    downtime = Downtime(START)
    downtime.seen(START)
    downtime.missed()
    downtime.seen(START + MINUTE)
    downtime.held(START + 0.5 * MINUTE, START + 1.5 * MINUTE)
    downtime.held(START + MINUTE, START + 2 * MINUTE)
    assert downtime.reasons(START + 3 * MINUTE) == [
        (START, NO_DAEMON),
        (START, NOT_FREE),
        (START + MINUTE, NO_DATABASE),
        (START + MINUTE, NOT_FREE),
        (START + 2 * MINUTE, MOVED),
        (START + 3 * MINUTE, NOT_FREE),
    ]


def test_without_a_database_a_claim_fails_and_the_downtime_knows(hire: Callable[..., Daemon]) -> None:
    nowhere = {"url": "postgresql://localhost:1/nowhere", "connect_timeout": 2}
    with Database(DatabaseSettings.model_validate(nowhere)) as unreachable:
        daemon = hire(unreachable)
        with pytest.raises(DatabaseUnavailable):
            daemon.at(START + MINUTE).claim()
    assert daemon.downtime.reasons(START + MINUTE)[-2:] == [(START + MINUTE, NO_DATABASE), (START + MINUTE, NOT_FREE)]


def test_a_downtime_counts_its_returns() -> None:
    downtime = Downtime(START)
    returns = []
    for seconds in (0, 30, 61, 60.5, 0, None, 1):  # first; beating; frozen; beating; clock put back; outage; its end
        if seconds is None:
            downtime.missed()
        else:
            downtime.seen(START + seconds * SECOND)
        returns.append(downtime.returns)
    assert returns == [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("seed", range(8))
def test_whoever_steps_in_when_every_slot_is_accounted_for_exactly_once(
    hire: Callable[..., Daemon], admin: psycopg.Connection, seed: int
) -> None:
    """Four daemons with clocks apart come and go at random, run for a while, die over their runs, pass over slots."""
    chance = random.Random(seed)
    daemons = [hire() for _ in range(4)]
    skew = [timedelta(seconds=chance.uniform(-40, 40)) for _ in daemons]
    running: list[tuple[int, Daemon]] = []
    now = START
    for _ in range(120):
        now += chance.choice([0.2, 0.5, 1, 1, 3]) * MINUTE
        number = chance.randrange(len(daemons))
        daemon = daemons[number].at(now + skew[number])
        if chance.random() < 0.2:
            daemon.downtime.missed() if chance.random() < 0.5 else daemon.downtime.seen(daemon.now)
        if chance.random() < 0.1:
            daemon.slots.pass_over()
        elif run_id := daemon.claim():
            running.append((run_id, daemon))
        if running and chance.random() < 0.5:
            run_id, owner = running.pop()
            owner.ledger.close(run_id, report(chance.choice(["succeeded", "aborted"])))

    found = rows(admin, "slot, coalesce(missed, 1), coalesce(last_slot, slot), reason, missed IS NOT NULL")
    expected, previous = START + MINUTE, None
    for slot, number_of_slots, last, reason, missed in found:
        assert slot == expected
        assert last == slot + (number_of_slots - 1) * MINUTE
        assert not missed or reason != previous, "one stretch for each reason"
        expected, previous = last + MINUTE, reason if missed else None
    account = admin.execute("SELECT accounted_until FROM catfeeder_cron.schedule").fetchone()
    assert account == (expected - MINUTE,)
