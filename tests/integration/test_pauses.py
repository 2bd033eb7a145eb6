"""Pauses: looked at by the statement that claims a slot, so in force for every process at once."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from catfeeder_cron.database import Database
from catfeeder_cron.ledger import Ledger, Process, pauses
from tests.integration.daemons import SECOND, Office, Work, rows, wait_for

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def ledgers(with_schema: None, database: Database) -> list[Ledger]:
    """Two daemons on one database, whose job `work` is accounted for until noon."""
    with database.transaction() as connection:
        connection.execute("INSERT INTO catfeeder_cron.schedule VALUES ('work', 'every 1s', %s)", [NOON])
    return [Ledger(database, Process("daemon")) for _ in range(2)]


@pytest.fixture
def office(with_schema_heard_of_for_long: None, database_url: str, tmp_path: Path) -> Iterator[Office]:
    office = Office(database_url, tmp_path)
    yield office
    office.close()


def claim(ledger: Ledger, second: int, *, shared: bool = False) -> int | None:
    """Claim the slot that many seconds after noon."""
    slot = NOON + second * SECOND
    return ledger.claim("work", "every 1s", slot - SECOND, slot, [], "schedule", shared=shared).run_id


@pytest.mark.parametrize("jobs", [["work"], [], ["work", "other", "work"]])
@pytest.mark.parametrize("shared", [False, True])
def test_slots_that_come_up_in_a_pause_are_one_stretch_for_all_daemons(
    database: Database, ledgers: list[Ledger], admin: psycopg.Connection, jobs: list[str], *, shared: bool
) -> None:
    pauses.pause(database, jobs, None, "moving")

    for second in range(1, 5):
        for ledger in ledgers:
            assert claim(ledger, second, shared=shared) is None

    first, last = NOON + SECOND, NOON + 4 * SECOND
    assert rows(admin, "slot, last_slot, missed, outcome, reason") == [(first, last, 4, "skipped", "paused: moving")]

    pauses.resume(database, jobs)
    assert claim(ledgers[0], 5, shared=shared) is not None


def test_a_pause_of_another_job_is_no_pause(database: Database, ledgers: list[Ledger]) -> None:
    pauses.pause(database, ["other"], None, None)

    assert claim(ledgers[0], 1) is not None


def test_a_pause_ends_by_the_databases_clock(
    database: Database, ledgers: list[Ledger], admin: psycopg.Connection
) -> None:
    pauses.pause(database, ["work"], timedelta(hours=2), None)
    assert claim(ledgers[0], 1) is None
    (pause,) = pauses.in_force(database)
    assert pause.until == pause.paused_at + timedelta(hours=2)

    admin.execute("UPDATE catfeeder_cron.pauses SET until = now()")
    assert claim(ledgers[0], 2) is not None
    assert pauses.in_force(database) == []
    assert pauses.resume(database, []) == []


def test_a_jobs_own_reason_goes_before_that_of_all(
    database: Database, ledgers: list[Ledger], admin: psycopg.Connection
) -> None:
    pauses.pause(database, [], None, "all")
    pauses.pause(database, ["work"], None, "own\nreason " + "x" * 1000)

    claim(ledgers[0], 1)

    ((reason,),) = rows(admin, "reason")
    assert reason.startswith("paused: own reason xxx")
    assert len(reason) < 600


def test_a_second_pause_replaces_the_first(database: Database, ledgers: list[Ledger]) -> None:
    pauses.pause(database, ["work"], timedelta(hours=1), "first")
    pauses.pause(database, ["work"], None, "second")

    (pause,) = pauses.in_force(database)
    assert (pause.until, pause.because) == (None, "second")
    assert pauses.resume(database, ["work", "other"]) == ["work"]


def test_a_job_that_is_overdue_is_not_caught_up_in_a_pause_but_can_be_run_by_hand(
    office: Office, database: Database, admin: psycopg.Connection
) -> None:
    work = Work()
    overdue = "INSERT INTO catfeeder_cron.schedule VALUES ('work', %s, now() - interval '3 h 30 min')"
    admin.execute(overdue, [office.trigger])
    pauses.pause(database, [], None, "moving")

    crons = office.open(work)
    assert crons.inject_crons() == 0
    wait_for(lambda: rows(admin, "1", "reason = 'paused: moving'"))

    assert work.runs == 0
    assert rows(admin, "missed", "reason = 'no daemon alive'") in ([(2,)], [(3,)])
    assert crons.run("work").outcome == "succeeded"
