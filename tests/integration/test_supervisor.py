"""Runs under watch: kept alive, asked to stop, recorded whatever happens to the database."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import sql

from catfeeder_cron.config import DatabaseSettings, JobSettings
from catfeeder_cron.database import Database
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.errors import DatabaseUnavailable, JobAborted, JobTimedOut
from catfeeder_cron.job import JobContext
from catfeeder_cron.ledger import DEAD_AFTER_SECONDS, Ledger, Process
from catfeeder_cron.ledger.constants import FENCE_GRACE_SECONDS, FENCE_SECONDS
from catfeeder_cron.scheduler import fence
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.fence import CUT_OFF
from catfeeder_cron.scheduler.listeners import Listeners, Origin, Run, RunListener
from catfeeder_cron.scheduler.recorder import ANSWER_LOST
from catfeeder_cron.scheduler.supervisor import RECORD_LOST, RUNS_HERE, TAKEN_FOR_DEAD, Supervisor
from tests.integration.daemons import SECOND, context, report, rows, wait_for
from tests.support.waiting import SOON


class Office(RunListener):
    """A supervisor on a database, and what it called."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.ledger = Ledger(database, Process("daemon"))
        self.downtime = Downtime(datetime.now(UTC))
        self.beats = 0
        self.stuck_runs = 0
        self.supervisor = Supervisor(self.ledger, self.downtime, timedelta(days=30), Listeners(self))

    def begin(self, job: str = "job", given: JobContext | None = None, origin: Origin | None = None) -> Run:
        origin = origin or Origin()
        claim = partial(self.ledger.claim_manual, job, shared=origin.shared)
        run = self.supervisor.begin(job, JobSettings(), given or context(self.database), claim, origin)
        assert run
        return run

    def beat(self, reached: bool, /) -> None:
        self.beats += reached

    def stuck(self, _run: Run, /) -> None:
        self.stuck_runs += 1


@pytest.fixture
def open_office(
    with_schema_heard_of_for_long: None, open_database: Callable[..., Database]
) -> Iterator[Callable[[], Office]]:
    opened: list[Office] = []

    def open_one() -> Office:
        opened.append(Office(open_database()))
        return opened[-1]

    yield open_one
    for office in opened:
        office.supervisor.close("the test is over")


@pytest.fixture
def office(open_office: Callable[[], Office]) -> Office:
    return open_office()


def freeze(office: Office, admin: psycopg.Connection, seconds: float = 40) -> None:
    """Make it look to itself and to the others as if it had been stopped for a while."""
    office.supervisor._last_beat -= seconds
    admin.execute("UPDATE catfeeder_cron.daemons SET heartbeat_at = heartbeat_at - %s * interval '1 s'", [seconds])


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the names of the events that the program itself has logged."""
    return [record.getMessage().split()[0] for record in caplog.records if record.name.startswith("catfeeder_cron")]


def test_a_run_is_recorded_when_it_ends(office: Office, admin: psycopg.Connection) -> None:
    run = office.begin()
    assert office.supervisor.runs.job_ids == ["job"]
    office.supervisor.end(run, report("failed", "no food"))
    assert office.supervisor.runs.job_ids == []
    assert rows(admin, "outcome, reason") == [("failed", "no food")]


def test_the_first_claim_makes_sure_that_the_others_know_this_process(
    office: Office, open_office: Callable[[], Office], admin: psycopg.Connection
) -> None:
    office.begin()
    open_office().supervisor.beat()
    assert rows(admin, "outcome") == [(None,)]


def test_a_frozen_process_learns_before_its_next_batch_that_its_run_was_closed(
    office: Office,
    open_office: Callable[[], Office],
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = office.begin()
    freeze(office, admin)
    open_office().supervisor.beat()
    assert rows(admin, "outcome") == [("aborted",)]

    with pytest.raises(JobAborted, match=TAKEN_FOR_DEAD):
        run.control.checkpoint()
    office.supervisor.end(run, report("aborted", TAKEN_FOR_DEAD))
    assert events(caplog) == ["dead_run_closed", "run_was_closed_by_another"]
    assert rows(admin, "outcome, reason") == [("aborted", "its process died or lost the database")]


def test_a_process_that_was_frozen_but_not_missed_goes_on(office: Office, admin: psycopg.Connection) -> None:
    run = office.begin()
    freeze(office, admin)
    run.control.checkpoint()
    assert office.beats == 2


def test_a_process_that_was_frozen_claims_nothing_before_the_others_know_that_it_lives(
    office: Office, open_office: Callable[[], Office], admin: psycopg.Connection
) -> None:
    office.supervisor.beat()
    freeze(office, admin)
    office.begin()
    open_office().supervisor.beat()
    assert rows(admin, "outcome") == [(None,)]


def test_after_a_request_to_stop_running_jobs_end_and_none_begins(office: Office, admin: psycopg.Connection) -> None:
    run = office.begin()
    office.supervisor.runs.request_stop(JobAborted("enough"))
    with pytest.raises(JobAborted, match="enough"):
        run.control.checkpoint()
    with pytest.raises(JobAborted, match="enough"):
        office.begin("another")
    assert len(rows(admin, "*")) == 1


def test_waiting_for_the_runs_includes_one_that_is_just_being_claimed(office: Office) -> None:
    claiming, go_on = threading.Event(), threading.Event()

    def claim() -> int | None:
        claiming.set()
        go_on.wait(SOON)
        return office.ledger.claim_manual("job", shared=False)

    runs: list[Run | None] = []
    begins = threading.Thread(
        target=lambda: runs.append(office.supervisor.begin("job", JobSettings(), context(office.database), claim))
    )
    begins.start()
    claiming.wait(SOON)
    office.supervisor.runs.request_stop(JobAborted("enough"))
    waits = threading.Thread(target=office.supervisor.runs.wait)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    go_on.set()
    begins.join()
    assert runs[0]
    assert runs[0].control.stopping
    office.supervisor.end(runs[0], report("aborted", "enough"))
    waits.join(SOON)
    assert not waits.is_alive()


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_that_was_asked_to_stop_is_looked_at_until_it_ends(office: Office, shared: bool) -> None:
    """The watch sleeps until then, and nothing else wakes it."""
    run = office.begin(origin=Origin(shared=shared))
    look_in = []
    for overdue in (-1, 1, 20, 21):
        run.control._started = time.monotonic() - run.control.timeout.total_seconds() - overdue
        look_in.append(round(office.supervisor.timeouts.enforce()))
    assert look_in == [1, 14, 300, 299]
    assert office.stuck_runs == 1


def test_a_run_claimed_without_an_answer_is_closed_at_the_second_look(
    office: Office, admin: psycopg.Connection
) -> None:
    office.supervisor.beat()
    office.ledger.claim_manual("job", shared=False)
    office.supervisor.beat()
    assert rows(admin, "outcome") == [(None,)]
    office.supervisor.beat()
    assert rows(admin, "outcome, reason") == [("aborted", ANSWER_LOST)]


def test_a_run_that_waits_or_has_ended_is_no_stray(office: Office, admin: psycopg.Connection) -> None:
    run = office.begin()
    for _ in range(3):
        office.supervisor.beat()
    assert rows(admin, "outcome") == [(None,)]
    office.supervisor.end(run, report())
    office.supervisor.beat()
    assert rows(admin, "outcome") == [("succeeded",)]


def test_what_is_abandoned_is_recorded_and_the_daemon_leaves_the_list(
    office: Office, admin: psycopg.Connection
) -> None:
    run = office.begin()
    run.control.counts["deleted"] = 7
    office.supervisor.close("still running 60 s after the stop")
    assert rows(admin, "outcome, reason, counts") == [("aborted", "still running 60 s after the stop", {"deleted": 7})]
    assert admin.execute("SELECT * FROM catfeeder_cron.daemons").fetchall() == []


def test_the_stop_flag_is_set_when_the_time_is_up_not_only_at_the_next_heartbeat(office: Office) -> None:
    office.supervisor.start()
    wait_for(lambda: office.beats)
    beats = office.beats
    run = office.begin(given=context(office.database, timeout=0.3))
    assert run.control.stop.wait(SOON)
    assert office.beats == beats
    with pytest.raises(JobTimedOut):
        run.control.checkpoint()


def test_a_run_that_ignores_its_flag_is_told_at_once_then_every_five_minutes(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    run = office.begin(given=context(office.database, timeout=1))
    told = []
    for overdue in (14, 16, 105, 310, 325, 630):
        run.control._started = time.monotonic() - 1 - overdue
        office.supervisor.timeouts.enforce()
        told.append(events(caplog).count("job_stuck"))
    assert told == [0, 1, 1, 1, 2, 3]
    assert office.stuck_runs == 1, "one more worker, not one for each report"
    assert run.control.stop


def test_a_run_of_a_process_that_is_cut_off_is_asked_to_end_before_others_may_begin_the_job(
    office: Office, admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    run = office.begin()
    shared = office.begin("shared", origin=Origin(shared=True))
    office.supervisor._last_beat -= FENCE_SECONDS - 10
    assert 0 < fence.enforce(office.supervisor.runs, office.supervisor._last_beat) <= 5
    assert not run.control.stop
    office.supervisor._last_beat -= 11

    fence.enforce(office.supervisor.runs, office.supervisor._last_beat)

    reason = run.control.stop.reason
    assert isinstance(reason, JobAborted)
    assert reason.grace_seconds == FENCE_GRACE_SECONDS
    assert str(reason) == CUT_OFF
    assert FENCE_SECONDS + FENCE_GRACE_SECONDS < DEAD_AFTER_SECONDS
    assert not shared.control.stop, "its rows are shared out by leases"
    assert shared.control.deadline.at == float("inf")
    assert events(caplog) == ["run_cut_off"]


def test_what_a_run_has_started_dies_by_a_deadline_that_each_heartbeat_puts_off(office: Office) -> None:
    """Its guard keeps it, so it holds in a process that is frozen, too."""
    run = office.begin()
    first = run.control.deadline.at
    assert first == office.supervisor._last_beat + FENCE_SECONDS + FENCE_GRACE_SECONDS
    office.supervisor.beat()
    assert run.control.deadline.at == office.supervisor._last_beat + FENCE_SECONDS + FENCE_GRACE_SECONDS > first


def test_a_run_that_was_asked_to_stop_before_is_cut_off_all_the_same(office: Office) -> None:
    run = office.begin()
    office.supervisor.runs.request_stop(JobAborted("enough"))
    office.supervisor._last_beat -= FENCE_SECONDS + 1
    fence.enforce(office.supervisor.runs, office.supervisor._last_beat)
    assert str(run.control.stop.reason) == "enough"
    assert run.control.stop.grace_left_seconds <= FENCE_GRACE_SECONDS


def test_the_fence_needs_no_heartbeat_to_return(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement that hangs holds up the thread of the heartbeat, and nothing else."""
    office.supervisor.start()
    wait_for(lambda: office.beats)
    hangs = threading.Event()
    monkeypatch.setattr(office.ledger, "beat", lambda: hangs.wait(SOON))
    run = office.begin()
    office.supervisor._wake_heartbeat.set()
    office.supervisor._last_beat -= FENCE_SECONDS
    office.supervisor._wake_watch.set()
    assert run.control.stop.wait(SOON)
    assert run.control.stop.reason
    assert str(run.control.stop.reason) == CUT_OFF
    hangs.set()
    monkeypatch.undo()


def lose_records(admin: psycopg.Connection) -> None:
    """Have the server go back to a time before all runs, and before most heartbeats."""
    admin.execute("DELETE FROM catfeeder_cron.job_runs")
    admin.execute("UPDATE catfeeder_cron.lineage SET counter = 0")


def test_a_run_whose_record_was_lost_goes_on_with_another_one(
    office: Office, admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    slot = datetime.now(UTC).replace(microsecond=0)
    run = office.begin(origin=Origin(slot, "schedule"))
    before = run.run_id
    office.supervisor.beat()
    lose_records(admin)
    office.supervisor.beat()
    office.supervisor.beat()
    assert not run.control.stop
    assert rows(admin, "run_id, slot, outcome") == [(run.run_id, slot, None)]
    assert run.run_id != before
    assert run.control.application_name == office.ledger.backends.name_for(run.run_id)
    office.supervisor.end(run, report())
    assert rows(admin, "slot, trigger, outcome, reason") == [(slot, "schedule", "succeeded", None)]
    assert events(caplog) == ["history_went_back", "run_recorded_again"]


def test_a_run_whose_record_was_lost_ends_where_another_process_has_begun_the_job(
    office: Office, open_office: Callable[[], Office], admin: psycopg.Connection
) -> None:
    run = office.begin()
    office.supervisor.beat()
    lose_records(admin)
    another = open_office().begin()
    office.supervisor.beat()
    with pytest.raises(JobAborted, match=RECORD_LOST):
        run.control.checkpoint()
    office.supervisor.end(run, report("aborted", RECORD_LOST))
    assert rows(admin, "run_id, reason", "outcome IS NULL") == [(another.run_id, None)]
    lost = f"{RECORD_LOST}; recorded again, because the database had lost it"
    assert rows(admin, "reason", "outcome = 'aborted'") == [(lost,)]


def test_a_run_is_recorded_when_the_server_does_nothing_for_it_any_more(
    office: Office, admin: psycopg.Connection, connect: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection broke, and the server goes on with its statement: the job must not begin again meanwhile."""
    run = office.begin()
    at_work = connect()
    at_work.execute(sql.SQL("SET application_name = {}").format(office.ledger.backends.name_for(run.run_id)))
    office.supervisor.end(run, report("failed", "no connection to the database"))
    with pytest.raises(psycopg.OperationalError):
        at_work.execute("SELECT 1")
    assert rows(admin, "outcome") == [("failed",)]
    assert events(caplog) == ["statement_of_ended_run_ended"]


def test_runs_that_this_process_remembers_are_recorded_anew(
    office: Office, admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    slot = datetime.now(UTC).replace(microsecond=0)
    office.supervisor.end(office.begin(origin=Origin(slot, "schedule")), report("failed", "no food"))
    office.supervisor.end(office.begin("between slots", origin=Origin(None, "schedule")), report(job="between slots"))
    lose_records(admin)
    office.supervisor.beat()
    ((job, found, trigger, outcome),) = rows(admin, "job, slot, trigger, outcome")
    assert (job, found, trigger, outcome) == ("job", slot, "schedule", "failed")
    assert events(caplog) == ["history_went_back", "runs_recorded_again"]


def test_a_run_is_recorded_anew_once_however_often_its_loss_is_met(office: Office, admin: psycopg.Connection) -> None:
    """A second row would say that the slot has run twice."""
    slot = datetime.now(UTC).replace(microsecond=0)
    runs = [office.begin(origin=Origin(slot, "schedule")), office.begin("by hand")]
    office.supervisor.beat()
    lose_records(admin)
    for run in runs:  # the first to meet the loss
        office.supervisor.end(run, report("failed", "no food", run.job_id))
    office.supervisor.beat()  # the second, by its answer
    admin.execute("UPDATE catfeeder_cron.lineage SET counter = 0")
    office.supervisor.beat()  # another failover
    assert rows(admin, "job, slot, outcome") == [("job", slot, "failed"), ("by hand", None, "failed")]


def test_a_run_without_an_answer_is_closed_though_its_number_was_that_of_another_jobs_run(
    office: Office, admin: psycopg.Connection
) -> None:
    run = office.begin()
    office.supervisor.end(run, report("failed", "no food"))
    admin.execute("UPDATE catfeeder_cron.job_runs SET job = 'another', outcome = NULL, reason = NULL")
    for _ in range(2):
        office.supervisor.beat()
    assert rows(admin, "job, outcome, reason") == [("another", "aborted", ANSWER_LOST)]


def test_a_run_that_the_server_has_as_open_again_is_closed_as_it_ended(
    office: Office, admin: psycopg.Connection
) -> None:
    run = office.begin()
    office.supervisor.end(run, report("failed", "no food"))
    admin.execute("UPDATE catfeeder_cron.job_runs SET outcome = NULL, reason = NULL, finished_at = NULL")
    for _ in range(2):
        office.supervisor.beat()
    assert rows(admin, "outcome, reason") == [("failed", "no food")]


def test_a_ledger_that_has_lost_a_run_gives_its_process_no_second_one(
    office: Office, admin: psycopg.Connection
) -> None:
    office.begin()
    admin.execute("DELETE FROM catfeeder_cron.job_runs")
    claim = partial(office.ledger.claim_manual, "job", shared=False)
    assert office.supervisor.begin("job", JobSettings(), context(office.database), claim) is None
    assert rows(admin, "outcome, reason") == [("aborted", RUNS_HERE)]


def test_the_time_is_the_servers(office: Office, admin: psycopg.Connection) -> None:
    office.supervisor.beat()
    before = admin.execute("SELECT clock_timestamp()").fetchone()
    now = office.supervisor.clock.now()
    after = admin.execute("SELECT clock_timestamp()").fetchone()
    assert before
    assert after
    assert before[0] - SECOND < now < after[0] + SECOND


def test_old_runs_are_forgotten_soon_after_the_start(office: Office, admin: psycopg.Connection) -> None:
    office.supervisor.end(office.begin(), report())
    admin.execute("UPDATE catfeeder_cron.job_runs SET finished_at = now() - interval '31 days'")
    office.supervisor.start()
    wait_for(lambda: rows(admin, "*") == [])


def stop(server: EmbeddedServer) -> None:
    assert server._programs.run("pg_ctl", "stop", "-D", "data", "-m", "fast", "-w").returncode == 0


def test_a_run_that_ends_while_the_database_is_away_is_recorded_when_it_is_back(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = DatabaseSettings.model_validate({"url": own_server.conninfo, "connect_timeout": 2})
    with Database(settings) as database:
        office = Office(database)
        run = office.begin()
        stop(own_server)
        office.supervisor.end(run, report("failed", "no food"))
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable):
                office.supervisor.beat()
        with pytest.raises(DatabaseUnavailable):
            office.begin()
        own_server._launch()
        office.supervisor.beat()
        with psycopg.connect(own_server.conninfo) as connection:
            assert rows(connection, "outcome, reason") == [("failed", "no food")]
        assert events(caplog) == [
            "database_unreachable",
            "run_not_recorded_yet",
            "database_reachable_again",
        ]
        assert office.downtime.returns == 2
        office.supervisor.close()


def test_a_run_that_went_on_while_the_database_was_restarted_is_still_its_processs(own_server: EmbeddedServer) -> None:
    settings = DatabaseSettings.model_validate({"url": own_server.conninfo, "connect_timeout": 2})
    with Database(settings) as database, Database(settings) as another:
        office, other = Office(database), Office(another)
        run = office.begin()
        other.supervisor.beat()
        stop(own_server)
        own_server._launch()
        with psycopg.connect(own_server.conninfo, autocommit=True) as connection:
            connection.execute("UPDATE catfeeder_cron.daemons SET heartbeat_at = heartbeat_at - interval '10 min'")
        other.supervisor._last_beat -= 40
        wait_for(lambda: beats(other))
        wait_for(lambda: beats(office))
        run.control.checkpoint()
        office.supervisor.end(run, report())
        with psycopg.connect(own_server.conninfo) as connection:
            assert rows(connection, "outcome") == [("succeeded",)]
        for each in (office, other):
            each.supervisor.close()


def beats(office: Office) -> bool:
    try:
        office.supervisor.beat()
    except DatabaseUnavailable:
        return False
    return True
