"""The ledger: a slot is claimed by one, what did not run is accounted for, the dead are cleared away."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from catfeeder_cron.database import Database
from catfeeder_cron.database.lineage import IS_CURRENT, Lineage
from catfeeder_cron.ledger import (
    DIED,
    NO_DAEMON,
    NO_DATABASE,
    STILL_RUNNING,
    Heartbeat,
    Ledger,
    Missed,
    Process,
    Retries,
    RunRecord,
    SlotClaim,
)
from catfeeder_cron.ledger.constants import SETTLE_LEAST_SECONDS
from catfeeder_cron.schedule import Slots
from catfeeder_cron.times import timestamp
from tests.integration.daemons import HOUR, report, rows, wait_for
from tests.support.waiting import eventually

# Whole hours that have gone by, so that slots look like those of an hourly job.
NOON = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 12 * HOUR


@pytest.fixture
def open_ledger(with_schema_heard_of_for_long: None, open_database: Callable[..., Database]) -> Callable[..., Ledger]:
    """Opens the ledger for one more process; `daemon` is its identity."""

    def open_one(daemon: UUID | None = None) -> Ledger:
        return Ledger(open_database(pool_max_size=2), Process("daemon", daemon or uuid4()))

    return open_one


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger], admin: psycopg.Connection) -> Ledger:
    """One with a job whose account stands at noon."""
    ledger = open_ledger()
    ledger.register({"job": "every 1h"}, [])
    set_account(admin, NOON)
    return ledger


def set_account(admin: psycopg.Connection, until: datetime) -> None:
    admin.execute("UPDATE catfeeder_cron.schedule SET accounted_until = %s", [until])


def hours(first: int, last: int, reason: str) -> Missed:
    return Missed(Slots(NOON + first * HOUR, NOON + last * HOUR, last - first + 1), reason)


def claim(ledger: Ledger, known: int, slot: int, *missed: Missed, shared: bool = False, run: bool = True) -> SlotClaim:
    return ledger.claim(
        "job",
        "every 1h",
        NOON + known * HOUR,
        NOON + slot * HOUR,
        list(missed),
        "schedule" if run else None,
        shared=shared,
    )


def test_of_many_that_try_at_once_one_claims_the_slot_and_all_learn_where_the_account_stands(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    others = [open_ledger() for _ in range(6)]
    together = threading.Barrier(len(others))
    claims: list[SlotClaim] = []

    def try_it(each: Ledger) -> None:
        together.wait()
        answer = claim(each, 0, 1)
        # Who was overtaken while it waited has not seen by whom.
        claims.append(answer if answer.accounted_until > NOON else claim(each, 0, 1))

    threads = [threading.Thread(target=try_it, args=[each]) for each in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len([each for each in claims if each.run_id]) == 1
    assert {each.accounted_until for each in claims} == {NOON + HOUR}
    assert rows(admin, "slot, outcome") == [(NOON + HOUR, None)]


def test_a_claim_accounts_for_the_slots_before_it_a_stretch_for_each_reason(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    answer = claim(ledger, 0, 6, hours(1, 3, NO_DAEMON), hours(4, 5, NO_DATABASE))

    assert answer.run_id
    assert rows(admin, "slot, last_slot, missed, outcome, reason") == [
        (NOON + HOUR, NOON + 3 * HOUR, 3, "skipped", NO_DAEMON),
        (NOON + 4 * HOUR, NOON + 5 * HOUR, 2, "skipped", NO_DATABASE),
        (NOON + 6 * HOUR, None, None, None, None),
    ]


def test_who_believes_the_account_to_stand_elsewhere_changes_nothing_and_learns_the_truth(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    answer = claim(ledger, -2, 3, hours(-1, 2, NO_DAEMON))

    assert answer == SlotClaim(NOON, None, too_early=False)
    assert rows(admin, "*") == []


def test_a_claim_repeated_because_its_answer_was_lost_adds_nothing(ledger: Ledger, admin: psycopg.Connection) -> None:
    claim(ledger, 0, 2, hours(1, 1, NO_DAEMON))

    assert claim(ledger, 0, 2, hours(1, 1, NO_DAEMON)) == SlotClaim(NOON + 2 * HOUR, None, too_early=False)
    assert len(rows(admin, "*")) == 2


def test_a_slot_that_comes_while_the_job_runs_is_missed_and_a_row_grows_while_the_reason_stays(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    other = open_ledger()
    run_id = claim(ledger, 0, 1).run_id
    assert run_id

    for hour, each in ((2, other), (3, ledger), (4, other)):
        assert claim(each, hour - 1, hour) == SlotClaim(NOON + hour * HOUR, None, too_early=False)
    claim(ledger, 4, 7, hours(5, 6, NO_DAEMON))
    claim(ledger, 7, 8)
    ledger.close(run_id, report())
    assert claim(other, 8, 9).run_id

    assert rows(admin, "slot, missed, reason") == [
        (NOON + HOUR, None, None),
        (NOON + 2 * HOUR, 3, STILL_RUNNING),
        (NOON + 5 * HOUR, 2, NO_DAEMON),
        (NOON + 7 * HOUR, 2, STILL_RUNNING),
        (NOON + 9 * HOUR, None, None),
    ]


def test_a_stretch_that_goes_on_for_the_same_reason_stays_one_row(ledger: Ledger, admin: psycopg.Connection) -> None:
    claim(ledger, 0, 3, hours(1, 3, NO_DAEMON), run=False)
    claim(ledger, 3, 6, hours(4, 5, NO_DAEMON))

    assert rows(admin, "slot, last_slot, missed") == [
        (NOON + HOUR, NOON + 5 * HOUR, 5),
        (NOON + 6 * HOUR, None, None),
    ]


def test_a_shared_job_runs_once_on_each_daemon_and_each_tells_of_its_own_overlap(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    other = open_ledger()
    assert claim(ledger, 0, 1, shared=True).run_id
    other_run = claim(other, 0, 1, shared=True).run_id
    assert other_run
    assert claim(other, 0, 1, shared=True).run_id is None, "not twice on one daemon"
    other.close(other_run, report())

    assert claim(ledger, 1, 2, shared=True).run_id is None, "it is still running here"
    assert claim(other, 1, 2, shared=True).run_id, "and has ended there"

    assert rows(admin, "slot, missed, reason, outcome") == [
        (NOON + HOUR, None, None, None),
        (NOON + HOUR, None, None, "succeeded"),
        (NOON + 2 * HOUR, 1, STILL_RUNNING, "skipped"),
        (NOON + 2 * HOUR, None, None, None),
    ]


def test_a_shared_slot_claimed_again_after_a_lost_answer_does_not_lengthen_an_older_stretch(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    first = claim(ledger, 0, 1, shared=True).run_id
    assert first
    claim(ledger, 1, 2, shared=True)
    ledger.close(first, report())
    assert claim(ledger, 2, 3, shared=True).run_id

    claim(ledger, 2, 3, shared=True)

    assert rows(admin, "missed", "missed IS NOT NULL") == [(1,)]


def test_a_manual_run_is_refused_while_the_job_runs_and_keeps_its_slot_from_running(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    run_id = ledger.claim_manual("job", shared=False)
    assert run_id
    assert ledger.claim_manual("job", shared=False) is None
    assert claim(ledger, 0, 1).run_id is None
    ledger.close(run_id, report())
    assert claim(ledger, 1, 2).run_id

    assert rows(admin, "trigger, reason") == [("schedule", STILL_RUNNING), ("schedule", None), ("manual", None)]


def test_a_slot_that_lies_ahead_by_the_servers_clock_is_nobodys(ledger: Ledger, admin: psycopg.Connection) -> None:
    now = datetime.now(UTC)
    soon, late = now, now + timedelta(minutes=1)

    assert ledger.claim("job", "every 1h", NOON, late, [], "schedule") == SlotClaim(NOON, None, too_early=True)
    assert ledger.claim("job", "every 1h", NOON, soon, [], "schedule").run_id


def test_an_account_opens_at_once_stays_as_it_is_and_starts_anew_with_another_trigger(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    before = datetime.now(UTC)
    accounts = ledger.register({"job": "every 1h", "new": "every 1h"}, [])
    assert accounts["job"] == NOON
    assert accounts["new"] >= before

    assert ledger.register({"job": "every 2h"}, [])["job"] >= before
    set_account(admin, NOON)
    assert ledger.register({"job": "every 2h"}, ["new"])["job"] == NOON, "the other trigger has become its own"
    assert ledger.register({"new": "every 1h"}, [])["new"] > accounts["new"], "disabled and enabled again: a new one"


def test_an_account_that_a_wrong_clock_has_left_in_the_future_is_put_back(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    set_account(admin, datetime.now(UTC) + timedelta(days=400))
    assert ledger.register({"job": "every 1h"}, [])["job"] <= datetime.now(UTC)


def set_heartbeat(admin: psycopg.Connection, daemon: UUID, seconds_ago: float) -> None:
    admin.execute(
        "UPDATE catfeeder_cron.daemons SET heartbeat_at = now() - %s * interval '1 s' WHERE daemon = %s",
        [seconds_ago, daemon],
    )


@pytest.mark.parametrize(("seconds_ago", "outcome"), [(28, None), (31, "aborted")])
def test_a_run_is_closed_when_its_daemon_has_been_silent_for_30_seconds_and_not_before(
    ledger: Ledger,
    open_ledger: Callable[..., Ledger],
    admin: psycopg.Connection,
    seconds_ago: float,
    outcome: str | None,
) -> None:
    daemon = UUID(int=1)
    other = open_ledger(daemon)
    other.beat()
    run_id = claim(other, 0, 1).run_id
    assert run_id
    assert other.beat() == Heartbeat({run_id}, [], {})
    set_heartbeat(admin, daemon, seconds_ago)

    closed = ledger.beat().closed

    assert rows(admin, "outcome") == [(outcome,)]
    assert bool(closed) == bool(outcome)
    if outcome:
        assert rows(admin, "reason, finished_at IS NOT NULL") == [(DIED, True)]
        assert "job (run " in closed[0]
        assert other.beat() == Heartbeat(set(), [], {}), "and it learns so, should it come back"


def test_a_run_of_a_process_that_has_left_or_never_said_that_it_lives_is_closed(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    other = open_ledger()
    other.beat()
    claim(other, 0, 1)
    other.leave()
    ledger.beat()
    assert rows(admin, "outcome") == [("aborted",)]


def test_a_process_whose_jobs_hold_every_connection_says_that_it_lives_all_the_same(
    ledger: Ledger, open_database: Callable[..., Database], admin: psycopg.Connection
) -> None:
    database = open_database(pool_max_size=1, connect_timeout=1)
    busy = Ledger(database, Process("daemon"))
    with database.transaction():
        busy.beat()
    assert len(admin.execute("SELECT * FROM catfeeder_cron.daemons").fetchall()) == 1


@pytest.mark.parametrize(
    "silence", ["written_at = now() - interval '14 s'", "written_at = now() + interval '1 h'", "counter = 0"]
)
def test_after_a_silence_however_it_came_about_everybody_has_30_seconds_to_come_back(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection, silence: LiteralString
) -> None:
    """The server was away or cut off; its clock was put back; it has lost its last seconds."""
    daemon = UUID(int=1)
    other = open_ledger(daemon)
    ledger.beat()
    other.beat()
    claim(other, 0, 1)
    set_heartbeat(admin, daemon, 3600)
    admin.execute(sql.SQL("UPDATE catfeeder_cron.lineage SET {}").format(sql.SQL(silence)))
    ledger.beat()
    for seconds, outcome in ((25, None), (35, "aborted")):
        admin.execute("UPDATE catfeeder_cron.lineage SET heard_since = now() - %s * interval '1 s'", [seconds])
        ledger.beat()
        assert rows(admin, "outcome") == [(outcome,)]


def test_a_heartbeat_in_the_future_is_none(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    """The server's clock was an hour ahead when the process died, and has been set right since."""
    other = open_ledger(UUID(int=1))
    other.beat()
    claim(other, 0, 1)
    set_heartbeat(admin, UUID(int=1), -3600)
    ledger.beat()
    assert rows(admin, "outcome") == [("aborted",)]


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split()[0] for record in caplog.records]


def lineage(ledger: Ledger) -> Lineage:
    found = ledger.beat().lineage
    assert found
    return found


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("UPDATE catfeeder_cron.lineage SET counter = 1", "the database knows of 1 heartbeats, and there were 3"),
        ("UPDATE catfeeder_cron.daemons SET beats = 1", "the database has lost 2 heartbeats of pid"),
        ("DELETE FROM catfeeder_cron.daemons", "the database has lost 3 heartbeats of pid"),
        ("UPDATE catfeeder_cron.lineage SET server = '7/00000001/16384'", "was 7/00000001/16384 before"),
    ],
)
def test_a_database_that_went_back_is_noticed_by_one_and_told_to_all(
    ledger: Ledger,
    open_ledger: Callable[..., Ledger],
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    loss: LiteralString,
    reason: str,
) -> None:
    other = open_ledger()
    before = [lineage(ledger) for _ in range(3)][-1]
    admin.execute(loss)
    after = lineage(ledger)
    assert after.id != before.id
    assert after.counter > before.counter
    assert reason in (after.reason or "")
    assert lineage(ledger).id == lineage(other).id == after.id, "once"
    assert events(caplog) == ["history_went_back"]


def test_of_many_that_see_one_loss_one_tells_it(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    processes = [ledger, *(open_ledger() for _ in range(3))]
    for process in processes * 3:
        before = lineage(process)
    admin.execute("UPDATE catfeeder_cron.lineage SET counter = 2")
    admin.execute("UPDATE catfeeder_cron.daemons SET beats = 1")
    after = [lineage(process) for process in processes * 2]
    assert {each.id for each in after}.isdisjoint({before.id})
    assert len({each.id for each in after}) == 1

    # Another loss, of the change as well: all know a newer lineage than the database does.
    admin.execute("UPDATE catfeeder_cron.lineage SET id = %s, since = %s, counter = 2", [before.id, before.since])
    again = [lineage(process) for process in processes * 2]
    assert len({each.id for each in again}) == 1
    assert {each.id for each in again}.isdisjoint({before.id, after[0].id})


def test_what_can_not_be_undone_is_handed_out_on_no_other_history(
    ledger: Ledger, open_ledger: Callable[..., Ledger], database: Database, admin: psycopg.Connection
) -> None:
    other = open_ledger()
    known = lineage(ledger)

    def is_current() -> bool:
        with database.transaction() as connection:
            return bool(connection.execute("SELECT " + IS_CURRENT, known.parameters()).fetchone()[0])  # type: ignore[index]

    assert is_current()
    other.beat()
    assert is_current(), "others' heartbeats change nothing"
    admin.execute("UPDATE catfeeder_cron.lineage SET counter = 0")
    assert not is_current(), "before any heartbeat has noticed"
    other.beat()
    assert not is_current(), "nor afterwards, before this process has heard of it"


def test_no_run_begins_that_must_be_the_only_one_before_all_have_recorded_theirs_again(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    """A run of another process may be under way whose record the server has lost."""
    other = open_ledger()
    for process in (ledger, other, ledger):
        process.beat()
    admin.execute("UPDATE catfeeder_cron.lineage SET counter = 1")
    unnoticed = claim(ledger, 0, 1)
    assert (unnoticed.run_id, unnoticed.accounted_until) == (None, NOON)
    assert unnoticed.wait_seconds
    assert claim(ledger, 0, 1, shared=True).run_id, "that has leases"
    set_account(admin, NOON)

    ledger.beat()
    wait = claim(ledger, 0, 2).wait_seconds
    assert wait
    assert SETTLE_LEAST_SECONDS - 10 < wait <= SETTLE_LEAST_SECONDS
    assert ledger.claim_manual("job", shared=False) is None

    admin.execute("UPDATE catfeeder_cron.daemons SET heartbeat_at = heartbeat_at - interval '12 s'")
    admin.execute("UPDATE catfeeder_cron.lineage SET since = since - interval '12 s'")
    assert ledger.settles_in(), "the other one lives, as far as is known, and has not been heard of since"
    other.beat()
    ledger.beat()
    assert ledger.settles_in() is None
    assert claim(ledger, 0, 2).run_id


@pytest.mark.parametrize(("seconds_ago", "settled"), [(24, False), (26, True)])
@pytest.mark.parametrize("what", ["who lives is not known", "one is cut off"])
def test_a_process_that_is_cut_off_has_ended_its_runs_after_25_seconds(
    ledger: Ledger,
    open_ledger: Callable[..., Ledger],
    admin: psycopg.Connection,
    seconds_ago: int,
    settled: bool,
    what: str,
) -> None:
    ledger.beat()
    if what == "one is cut off":
        open_ledger(UUID(int=1)).beat()
        set_heartbeat(admin, UUID(int=1), seconds_ago + 5)
    known = "since - interval '1 h'" if what == "who lives is not known" else "since"
    admin.execute(
        "UPDATE catfeeder_cron.lineage SET reason = 'restored', since = now() - %s * interval '1 s'", [seconds_ago]
    )
    admin.execute(f"UPDATE catfeeder_cron.lineage SET known_until = {known}".encode())
    assert (ledger.settles_in() is None) == settled


def test_what_a_host_remembers_tells_a_new_process_that_the_server_is_an_old_copy(
    open_database: Callable[..., Database],
    ledger: Ledger,
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def start() -> Ledger:
        started = Ledger(open_database(), Process("daemon"), tmp_path)
        started.prepare()
        return started

    first = start()
    assert not lineage(first).stale
    first.leave()
    (remembered,) = tmp_path.iterdir()
    assert remembered.stat().st_mode & 0o777 == 0o600
    memory = json.loads(remembered.read_text())

    # The counter alone: a restored backup.
    admin.execute("UPDATE catfeeder_cron.lineage SET counter = 0")
    restored = lineage(start())
    assert str(restored.id) != memory["id"]
    assert not restored.stale

    # A lower timeline: a former primary. The memory stays, so that the next process knows, too.
    remembered.write_text(json.dumps(memory | {"timeline": "0000000A"}))
    for _ in range(2):
        assert "the server is on timeline 1, and this host has worked with its timeline 10" in lineage(start()).stale
    remembered.write_text("[]")
    assert not lineage(start()).stale
    assert events(caplog) == ["history_went_back", "database_is_an_old_copy", "database_is_an_old_copy"]


def test_a_heartbeat_that_arrives_after_later_ones_is_no_sign_of_a_loss(ledger: Ledger) -> None:
    """It was given up when the network held it back, and goes on its way when that is possible again."""
    for _ in range(3):
        known = lineage(ledger)
    ledger._lineage._beats = 1
    ledger.beat()
    ledger._lineage._beats = 3
    assert lineage(ledger).id == known.id


def test_a_statement_of_a_dead_process_that_the_server_still_works_on_is_a_run_under_way(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection, connect: Callable[..., Any]
) -> None:
    other = open_ledger(UUID(int=1))
    other.beat()
    run_id = claim(other, 0, 1).run_id
    assert run_id
    at_work = connect()
    at_work.execute(sql.SQL("SET application_name = {}").format(other.backends.name_for(run_id)))
    set_heartbeat(admin, UUID(int=1), 60)

    (backend,) = ledger.beat().working
    assert backend == at_work.info.backend_pid
    assert rows(admin, "outcome") == [(None,)]
    ledger.backends.end(backend)
    eventually(lambda: ledger.beat().closed)
    assert rows(admin, "outcome") == [("aborted",)]


def test_a_number_that_was_given_out_again_closes_nobody_elses_run(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    ledger = open_ledger(UUID(int=2))
    run_id = claim(ledger, 0, 1).run_id
    assert run_id
    admin.execute("UPDATE catfeeder_cron.job_runs SET daemon = %s", [UUID(int=1)])
    closed = ledger.close(run_id, report())
    assert closed.vanished
    assert not closed.by_another
    assert rows(admin, "outcome") == [(None,)]
    admin.execute("UPDATE catfeeder_cron.job_runs SET job = 'another', daemon = %s", [UUID(int=2)])
    assert ledger.close(run_id, report()).vanished
    assert rows(admin, "outcome") == [(None,)]


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_record_was_lost_is_recorded_anew_and_that_its_slot_ran_twice_can_be_told(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection, again: bool
) -> None:
    run_id = claim(ledger, 0, 1).run_id
    assert run_id
    ledger.close(run_id, report("failed", "no food"))
    record = RunRecord(run_id, report("failed", "no food"), NOON + HOUR, "schedule")
    assert not ledger.restore(record), "it is there"
    admin.execute("DELETE FROM catfeeder_cron.job_runs")
    set_account(admin, NOON)
    if again:
        other = claim(open_ledger(), 0, 1).run_id
        assert other

    assert ledger.restore(record)

    lost = f"no food; recorded again, because the database had lost it (slot {timestamp(NOON + HOUR)})"
    expected = [(NOON + HOUR, None, None), (None, "failed", lost)] if again else [(NOON + HOUR, "failed", lost)]
    assert rows(admin, "slot, outcome, reason") == expected


def test_no_heartbeat_waits_for_a_row_that_somebody_has_locked(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection, connect: Callable[..., Any]
) -> None:
    """It would hold up those of all other processes."""
    other = open_ledger(UUID(int=1))
    other.beat()
    claim(other, 0, 1)
    set_heartbeat(admin, UUID(int=1), 90_000)
    somebody = connect(autocommit=False)
    somebody.execute("SELECT FROM catfeeder_cron.job_runs FOR UPDATE")
    somebody.execute("SELECT FROM catfeeder_cron.daemons FOR UPDATE")
    assert ledger.beat().closed == []
    somebody.rollback()
    assert len(ledger.beat().closed) == 1


def test_a_daemon_that_was_silent_for_a_day_is_forgotten(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    for number, seconds in ((1, 86_300), (2, 86_500)):
        open_ledger(UUID(int=number)).beat()
        set_heartbeat(admin, UUID(int=number), seconds)
    ledger.beat()
    known = {row[0] for row in admin.execute("SELECT daemon FROM catfeeder_cron.daemons").fetchall()}
    assert UUID(int=1) in known
    assert UUID(int=2) not in known


def test_a_close_repeated_because_its_answer_was_lost_is_no_news_but_one_by_another_is(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    run_id = claim(ledger, 0, 1).run_id
    assert run_id
    assert not ledger.close(run_id, report("failed", "no food")).by_another
    assert not ledger.close(run_id, report("failed", "no food")).by_another
    assert ledger.close(run_id, report("succeeded")).by_another
    assert rows(admin, "outcome, reason, error") == [("failed", "no food", "no food")]


@pytest.mark.parametrize(
    ("outcome", "days", "kept"),
    [
        ("succeeded", 29, True),
        ("succeeded", 31, False),
        ("skipped", 31, False),
        ("failed", 31, True),
        ("failed", 89, True),
        ("failed", 91, False),
        ("aborted", 89, True),
        ("timed_out", 89, True),
        ("timed_out", 91, False),
    ],
)
def test_runs_are_kept_for_a_while_and_failures_three_times_as_long(
    ledger: Ledger, admin: psycopg.Connection, outcome: str, days: int, kept: bool
) -> None:
    run_id = claim(ledger, 0, 1).run_id
    assert run_id
    ledger.close(run_id, report(outcome))
    admin.execute("UPDATE catfeeder_cron.job_runs SET finished_at = now() - %s * interval '1 day'", [days])
    assert ledger.forget(timedelta(days=30)) == (0 if kept else 1)


def test_a_run_that_is_under_way_is_never_forgotten_nor_a_stretch_that_still_grows(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    claim(ledger, 0, 1)
    claim(ledger, 1, 2)
    admin.execute("UPDATE catfeeder_cron.job_runs SET started_at = now() - interval '1 year'")
    assert ledger.forget(timedelta(days=30)) == 0


def test_the_heartbeat_does_not_read_the_history(
    ledger: Ledger, connect: Callable[..., psycopg.Connection], admin: psycopg.Connection
) -> None:
    other = connect()
    other.execute(
        "INSERT INTO catfeeder_cron.job_runs (job, slot, trigger, outcome, finished_at, host, pid, daemon) "
        "SELECT 'job', now() - n * interval '1 s', 'schedule', 'succeeded', now(), 'h', 1, gen_random_uuid() "
        "FROM generate_series(1, 20000) n"
    )
    other.execute("ANALYZE catfeeder_cron.job_runs")
    other.close()
    before = scanned(admin, 20_000)
    ledger.beat()
    claim(ledger, 0, 1)
    ledger._database.close()
    assert scanned(admin, 20_001) == before


def scanned(admin: psycopg.Connection, runs: int) -> int:
    """Return how often the history was read from its beginning to its end, when the server knows of so many runs.

    What a session has done is known when it has ended.
    """
    query = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'job_runs' AND n_tup_ins = %s"
    (scans,) = eventually(lambda: admin.execute(query, [runs]).fetchone())
    return int(scans)


def woken_run(ledger: Ledger, outcome: str = "succeeded", **counts: int) -> int:
    run_id = ledger.claim_woken("job", shared=True)
    assert run_id is not None
    ledger.close(run_id, replace(report(outcome), counts=counts))
    ledger.close(run_id, replace(report(outcome), counts=counts))  # repeated, as after a lost answer
    return run_id


def test_runs_between_slots_that_follow_each_other_are_one_row(ledger: Ledger, admin: psycopg.Connection) -> None:
    woken_run(ledger, due=2, done=2)
    woken_run(ledger, due=3, done=2, retried=1)
    last = woken_run(ledger)

    assert rows(admin, "run_id, slot, trigger, outcome, runs, counts") == [
        (last, None, "schedule", "succeeded", 3, {"due": 5, "done": 4, "retried": 1})
    ]
    assert rows(admin, "started_at < finished_at") == [(True,)]

    admin.execute("UPDATE catfeeder_cron.job_runs SET started_at = started_at - interval '61 min'")
    woken_run(ledger, due=1)
    assert rows(admin, "runs") == [(3,), (1,)]


def test_a_run_between_slots_is_taken_in_by_no_other_kind(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    """Not by one that failed, had a slot, was begun by hand or is another daemon's; nor does it take in those."""
    woken_run(ledger)
    woken_run(ledger, "failed")
    woken_run(ledger)
    manual = ledger.claim_manual("job", shared=True)
    assert manual is not None
    ledger.close(manual, report())
    woken_run(ledger)
    slot = claim(ledger, 0, 1, shared=True)
    assert slot.run_id is not None
    ledger.close(slot.run_id, report())
    woken_run(open_ledger())
    woken_run(ledger)

    assert rows(admin, "runs") == [(1,)] * 8


def test_a_run_that_another_closes_at_that_moment_takes_nothing_in(
    ledger: Ledger, admin: psycopg.Connection, database_url: str
) -> None:
    earlier = woken_run(ledger, done=5)
    run_id = ledger.claim_woken("job", shared=True)
    assert run_id is not None
    with psycopg.connect(database_url) as other:
        other.execute(
            "UPDATE catfeeder_cron.job_runs SET outcome = 'aborted', finished_at = now() WHERE run_id = %s", [run_id]
        )
        closing = threading.Thread(target=ledger.close, args=[run_id, report()])
        closing.start()
        wait_for(
            lambda: (
                admin.execute(
                    "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                ).fetchone()
                is not None
            )
        )
    closing.join()

    assert rows(admin, "run_id, outcome, counts") == [(earlier, "succeeded", {"done": 5}), (run_id, "aborted", {})]


MINUTE = timedelta(minutes=1)


def fail(ledger: Ledger, run_id: int | None, most: int = 3, after: timedelta = MINUTE, before: int | None = 12) -> Any:
    """Close a run as failed; return in how long it is retried."""
    assert run_id
    retries = Retries(most, after, None if before is None else NOON + before * HOUR + 12 * HOUR)
    return ledger.close(run_id, report("failed", "no food"), retries).retry_in


def make_due(admin: psycopg.Connection) -> None:
    admin.execute("UPDATE catfeeder_cron.schedule SET retry_at = now() WHERE retry_at IS NOT NULL")


def test_a_run_that_failed_is_retried_with_its_slot_later_and_later_until_its_retries_are_used_up(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    run_id, pauses = claim(ledger, 0, 1).run_id, []
    for _ in range(3):
        pauses.append(fail(ledger, run_id))
        assert ledger.claim_retry("job") is None, "it is not due"
        make_due(admin)
        run_id = ledger.claim_retry("job")
        assert ledger.claim_retry("job") is None, "it is claimed"
    assert fail(ledger, run_id) is None

    for number, pause in enumerate(pauses):
        assert MINUTE * 2**number <= pause <= MINUTE * 2**number * 1.25
    assert rows(admin, "slot, trigger, outcome") == [
        (NOON + HOUR, trigger, "failed") for trigger in ("schedule", "retry", "retry", "retry")
    ]


@pytest.mark.parametrize(
    ("outcome", "retried"),
    [("failed", True), ("timed_out", True), ("succeeded", False), ("skipped", False), ("aborted", False)],
)
def test_what_failed_or_timed_out_is_retried_and_nothing_else(ledger: Ledger, outcome: str, retried: bool) -> None:
    run_id = claim(ledger, 0, 1).run_id
    assert run_id

    closed = ledger.close(run_id, report(outcome), Retries(1, MINUTE, None))

    assert (closed.retry_in is not None) == retried


def test_no_pause_is_longer_than_an_hour_and_a_quarter(ledger: Ledger, admin: psycopg.Connection) -> None:
    pause = fail(ledger, claim(ledger, 0, 1).run_id, after=timedelta(days=300), before=None)

    assert HOUR <= pause <= 1.25 * HOUR


def test_a_run_by_hand_is_not_retried(ledger: Ledger) -> None:
    assert fail(ledger, ledger.claim_manual("job", shared=False)) is None


def test_a_retry_that_would_come_after_the_next_slot_is_none(ledger: Ledger) -> None:
    assert fail(ledger, claim(ledger, 0, 1).run_id, before=-1) is None


def test_the_next_slot_takes_the_place_of_a_retry(ledger: Ledger, admin: psycopg.Connection) -> None:
    first = claim(ledger, 0, 1).run_id
    assert fail(ledger, first)
    second = claim(ledger, 1, 2).run_id
    assert second
    make_due(admin)
    assert ledger.claim_retry("job") is None
    assert ledger.beat().retries == {}
    assert ledger.close(second, report()).retry_in is None

    late = claim(ledger, 2, 3).run_id
    claim(ledger, 3, 4)
    assert fail(ledger, late) is None, "its slot is not the last one any more"


def test_of_many_daemons_one_makes_the_retry_and_all_learn_when_it_is_due(
    ledger: Ledger, open_ledger: Callable[..., Ledger], admin: psycopg.Connection
) -> None:
    others = [open_ledger() for _ in range(6)]
    assert fail(ledger, claim(ledger, 0, 1).run_id)
    assert others[0].beat().retries == {}, "it is a minute away"
    admin.execute("UPDATE catfeeder_cron.schedule SET retry_at = now() + interval '9 s'")
    assert timedelta(0) < others[0].beat().retries["job"] <= timedelta(seconds=9)
    make_due(admin)
    assert others[1].beat().retries == {"job": timedelta(0)}
    together = threading.Barrier(len(others))
    claims: list[int | None] = []

    def try_it(each: Ledger) -> None:
        together.wait()
        claims.append(each.claim_retry("job"))

    threads = [threading.Thread(target=try_it, args=[each]) for each in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len([each for each in claims if each]) == 1


def test_a_retry_that_is_due_during_a_pause_is_skipped_like_a_slot(ledger: Ledger, admin: psycopg.Connection) -> None:
    fail(ledger, claim(ledger, 0, 1).run_id)
    make_due(admin)
    admin.execute("INSERT INTO catfeeder_cron.pauses (job, because, host) VALUES ('*', 'moving', 'h')")

    assert ledger.claim_retry("job") is None
    admin.execute("DELETE FROM catfeeder_cron.pauses")
    assert ledger.claim_retry("job") is None
    assert rows(admin, "trigger, outcome, reason")[1:] == [("retry", "skipped", "paused: moving")]


def test_a_retry_waits_while_the_job_runs_by_hand(ledger: Ledger, admin: psycopg.Connection) -> None:
    fail(ledger, claim(ledger, 0, 1).run_id)
    make_due(admin)
    by_hand = ledger.claim_manual("job", shared=False)
    assert by_hand
    assert ledger.claim_retry("job") is None
    ledger.close(by_hand, report())
    assert ledger.claim_retry("job")


def test_a_changed_trigger_ends_what_was_to_be_retried_and_an_unchanged_one_does_not(
    ledger: Ledger, admin: psycopg.Connection
) -> None:
    fail(ledger, claim(ledger, 0, 1).run_id)
    make_due(admin)
    ledger.register({"job": "every 1h"}, [])
    assert ledger.beat().retries
    ledger.register({"job": "every 2h"}, [])
    assert not ledger.beat().retries
    assert ledger.claim_retry("job") is None
