"""Crons: the configured jobs on a schedule or by hand, in one process or in several on one database."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import BackgroundTasks, Crons
from catfeeder_cron.config import JobSettings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import JobIsRunning
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.jobs import load_settings
from tests.integration.daemons import (
    SECOND,
    Office,
    Work,
    has_account,
    heart,
    quiet_interval,
    rows,
    tasks_of,
    wait_for,
)
from tests.support.waiting import SOON

Events = Callable[[], list[str]]


@pytest.fixture
def office(with_schema_heard_of_for_long: None, database_url: str, tmp_path: Path) -> Iterator[Office]:
    office = Office(database_url, tmp_path)
    yield office
    office.close()


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Events:
    """Gives the names of the events that the program itself has logged."""
    caplog.set_level("INFO")
    return lambda: [
        record.getMessage().split()[0] for record in caplog.records if record.name.startswith("catfeeder_cron")
    ]


def opened(admin: psycopg.Connection) -> bool:
    """Whether the job's account has been opened."""
    if admin.execute("SELECT to_regclass('catfeeder_cron.schedule')").fetchone() == (None,):
        return False
    return bool(admin.execute("SELECT FROM catfeeder_cron.schedule").fetchall())


def absent(admin: psycopg.Connection, office: Office, work: Work, back: str = "3 h 30 min", **options: Any) -> None:
    """Have a daemon open the job's account and leave, and make it look as if that had been a while ago."""
    with office.open(work, **options) as crons:
        assert crons.inject_crons() == 0
        wait_for(lambda: opened(admin))
    admin.execute("UPDATE catfeeder_cron.schedule SET accounted_until = now() - %s::interval", [back])
    admin.execute("DELETE FROM catfeeder_cron.job_runs")


def test_both_classes_are_imported_from_the_package_and_crons_is_final() -> None:
    with pytest.raises(TypeError, match="final"):
        type("More", (Crons,), {})


def test_two_daemons_run_each_slot_once(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    for _ in range(2):
        assert office.open(work, interval=1).inject_crons() == 0
    wait_for(lambda: work.runs >= 3)
    office.close()

    found = rows(admin, "slot, missed, outcome")
    assert work.runs == len(found)
    assert {(missed, outcome) for _, missed, outcome in found} == {(None, "succeeded")}
    slots = [slot for slot, _, _ in found]
    assert [later - earlier for earlier, later in pairwise(slots)] == [SECOND] * (len(slots) - 1)


def test_a_job_that_never_ran_waits_for_its_first_slot(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    crons = office.open(work)
    assert crons.inject_crons() == 0
    wait_for(lambda: opened(admin))
    heart(crons)
    assert work.runs == 0
    assert rows(admin, "*") == []


def test_a_job_that_is_overdue_at_the_start_runs_once_and_the_rest_is_accounted_for(
    office: Office, admin: psycopg.Connection
) -> None:
    work = Work()
    absent(admin, office, work)
    for crons in (office.open(work), office.open(work)):
        crons.inject_crons()
        heart(crons)
    wait_for(lambda: work.runs)
    office.close()

    assert work.runs == 1
    found = rows(admin, "trigger, outcome, reason, missed")
    assert found[-1] == ("catch_up", "succeeded", None, None)
    assert found[0][:3] == ("schedule", "skipped", "no daemon alive")
    assert found[0][3] in (2, 3)


def test_without_catch_up_an_overdue_job_is_accounted_for_and_waits(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    absent(admin, office, work)
    crons = office.open(work, catch_up=False)
    crons.inject_crons()
    wait_for(lambda: rows(admin, "*"))
    heart(crons)

    ((outcome, reason, missed),) = rows(admin, "outcome, reason, missed")
    assert (outcome, reason) == ("skipped", "no daemon alive")
    assert missed in (3, 4)
    assert work.runs == 0


def test_a_restart_between_two_slots_runs_nothing_and_loses_nothing(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    absent(admin, office, work, back="0 s")
    before = admin.execute("SELECT accounted_until FROM catfeeder_cron.schedule").fetchall()
    for _ in range(3):
        with office.open(work) as crons:
            crons.inject_crons()
            wait_for(lambda: has_account(crons))
    assert work.runs == 0
    assert admin.execute("SELECT accounted_until FROM catfeeder_cron.schedule").fetchall() == before


def test_another_trigger_starts_a_new_account(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    absent(admin, office, work)
    crons = office.open(work, interval=quiet_interval(7200))
    crons.inject_crons()
    wait_for(lambda: has_account(crons))
    heart(crons)
    assert rows(admin, "*") == []


def test_a_date_that_passed_while_no_daemon_lived_is_caught_up_once(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    date = datetime.now(UTC) + timedelta(seconds=8)
    options = {"interval": None, "date": f"{date:%Y-%m-%dT%H:%M:%S.%fZ}"}
    config = office._folder / "date.toml"
    config.write_text(f'[database]\nurl = "{office._url}"\n[jobs.work]\ndate = {options["date"]}\n')
    config.chmod(0o600)
    for wait in (lambda: opened(admin), lambda: work.runs, lambda: True):
        with Crons(config=config, jobs={"work": work.job}) as crons:
            assert crons.inject_crons() == 0
            wait_for(lambda: has_account(crons))
            wait_for(wait)
        if work.runs == 0:
            time.sleep(max(0.0, (date - datetime.now(UTC)).total_seconds()))
    assert work.runs == 1
    assert rows(admin, "trigger, slot") == [("catch_up", date)]


def test_daemons_that_start_together_on_a_new_database_create_the_schema_once(
    office: Office, admin: psycopg.Connection, events: Events
) -> None:
    all_crons = [office.open(Work()) for _ in range(5)]
    threads = [threading.Thread(target=heart, args=[crons]) for crons in all_crons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admin.execute("SELECT count(*) FROM catfeeder_cron.daemons").fetchall() == [(5,)]


def test_a_job_never_overlaps_and_what_it_missed_is_one_row(office: Office, admin: psycopg.Connection) -> None:
    work = Work(released=False)
    for _ in range(2):
        office.open(work, interval=1).inject_crons()
    wait_for(lambda: work.runs)
    wait_for(lambda: rows(admin, "*", "missed >= 2"))
    work.released.set()
    wait_for(lambda: rows(admin, "*", "outcome = 'succeeded'"))
    office.close()

    assert work.most_at_once == 1
    found = rows(admin, "missed, reason")
    assert found[0] == (None, None)
    assert found[1][1] == "still running"
    assert len([missed for missed, _ in found if missed]) == 1


def test_with_a_single_worker_what_a_run_left_no_room_for_was_missed_because_of_it(
    office: Office, admin: psycopg.Connection
) -> None:
    work = Work(released=False)
    office.open(work, max_workers=1, interval=1).inject_crons()
    wait_for(lambda: work.runs)
    time.sleep(1.1)  # in which a slot goes by
    work.released.set()
    wait_for(lambda: rows(admin, "*", "missed >= 1"))
    office.close()
    assert {reason for (reason,) in rows(admin, "reason", "missed IS NOT NULL")} == {"still running"}


def test_a_shared_job_runs_on_every_daemon_at_each_slot(office: Office, admin: psycopg.Connection) -> None:
    work = Work(shared=True, released=False)
    for _ in range(2):
        office.open(work, interval=1).inject_crons()
    wait_for(lambda: work.most_at_once == 2)
    work.released.set()
    slots = "missed IS NULL GROUP BY slot HAVING count(DISTINCT daemon) = 2"
    query = f"SELECT slot FROM catfeeder_cron.job_runs WHERE {slots}"
    wait_for(lambda: len(admin.execute(query.encode()).fetchall()) >= 2)


def test_a_run_that_is_longer_than_half_its_interval_is_warned_about(office: Office, events: Events) -> None:
    slow, quick = Work("slow", released=False), Work("quick")
    office.open(slow, interval=2).inject_crons()
    office.open(quick, interval=1).inject_crons()
    wait_for(lambda: slow.runs)
    time.sleep(1.1)
    slow.released.set()
    wait_for(lambda: "job_slow" in events())
    office.close()
    assert events().count("job_slow") == 1


def test_a_job_that_obeys_is_stopped_when_its_time_is_up(office: Office, admin: psycopg.Connection) -> None:
    work = Work(released=False)
    report = office.open(work, timeout=0.3).run("work")
    assert (report.outcome, report.reason) == ("timed_out", "longer than its timeout of 0.3 s")
    assert report.duration >= timedelta(seconds=0.3)
    assert rows(admin, "outcome, reason") == [("timed_out", "longer than its timeout of 0.3 s")]


def test_a_statement_is_cancelled_when_the_time_of_its_job_is_up(office: Office, admin: psycopg.Connection) -> None:
    def run(context: JobContext, settings: JobSettings) -> None:
        with context.transaction() as connection:
            connection.execute("SELECT pg_sleep(3600)")

    work = Work()
    work.job = Job(id="work", summary="sleep", settings=JobSettings, run=run)
    report = office.open(work, timeout=0.5).run("work")
    assert report.outcome == "timed_out"
    assert rows(admin, "outcome") == [("timed_out",)]


def test_a_job_that_ends_after_its_time_was_up_has_timed_out(office: Office, admin: psycopg.Connection) -> None:
    def run(context: JobContext, settings: JobSettings) -> None:
        assert context.stop.wait(SOON)

    work = Work()
    work.job = Job(id="work", summary="end late", settings=JobSettings, run=run)
    assert office.open(work, timeout=0.3).run("work").outcome == "timed_out"


def test_a_stuck_job_is_reported_and_the_others_go_on_in_its_place(
    office: Office, admin: psycopg.Connection, events: Events, tmp_path: Path
) -> None:
    stuck, other = Work("stuck", released=False, obeys=False), Work("other")
    config = tmp_path / "config.toml"
    config.write_text(
        f'[database]\nurl = "{office._url}"\n[scheduler]\nmax_workers = 1\n'
        "[jobs.stuck]\ninterval = 1\ntimeout = 1\n[jobs.other]\ninterval = 1\n"
    )
    config.chmod(0o600)
    with Crons(config=config, jobs={"stuck": stuck.job, "other": other.job}) as crons:
        crons.inject_crons()
        wait_for(lambda: stuck.runs)
        held = other.runs
        (run,) = [run for run in crons._open().supervisor.runs.under_way if run.job_id == "stuck"]
        run.control._started -= 60
        crons._open().supervisor._wake_watch.set()
        wait_for(lambda: other.runs > held + 1)
        assert events().count("job_stuck") == 1
        assert rows(admin, "outcome", "job = 'stuck' AND missed IS NULL") == [(None,)], "it does run, so none other may"
        stuck.released.set()
    assert rows(admin, "outcome", "job = 'stuck' AND missed IS NULL")[0] == ("timed_out",)


def test_a_failure_is_recorded_and_the_schedule_goes_on(office: Office, admin: psycopg.Connection) -> None:
    def run(context: JobContext, settings: JobSettings) -> None:
        work.runs += 1
        raise ValueError("secret")

    work = Work()
    work.job = Job(id="work", summary="fail", settings=JobSettings, run=run)
    office.open(work, interval=1).inject_crons()
    wait_for(lambda: work.runs == 2)
    office.close()
    assert rows(admin, "outcome, reason")[0] == ("failed", "ValueError: see the log for the traceback")


def test_a_job_that_runs_elsewhere_is_refused_with_the_place_or_waited_for(office: Office) -> None:
    work = Work(released=False)
    first, second = office.open(work), office.open(work)
    runs = threading.Thread(target=lambda: first.run("work"))
    runs.start()
    wait_for(lambda: work.runs)
    with pytest.raises(JobIsRunning, match=f"work is running already: on .*, pid {os.getpid()}, since 20"):
        second.run("work")
    with pytest.raises(JobIsRunning):
        second.run("work", wait=timedelta(seconds=0.6))
    threading.Timer(0.3, work.released.set).start()
    assert second.run("work", wait=timedelta(seconds=20)).outcome == "succeeded"
    runs.join()
    assert work.most_at_once == 1


def test_a_shared_job_that_this_process_runs_already_is_refused_with_the_place(office: Office) -> None:
    work = Work(shared=True, released=False)
    crons = office.open(work)
    runs = threading.Thread(target=lambda: crons.run("work"))
    runs.start()
    wait_for(lambda: work.runs)
    with pytest.raises(JobIsRunning, match=f"work is running already: on .*, pid {os.getpid()}, since 20"):
        crons.run("work")
    work.released.set()
    runs.join()


def test_the_time_of_a_job_begins_when_it_does_not_while_it_waits_for_another(office: Office) -> None:
    work = Work(released=False)
    first, second = office.open(work), office.open(work, timeout=0.5)
    runs = threading.Thread(target=lambda: first.run("work"))
    runs.start()
    wait_for(lambda: work.runs)
    threading.Timer(1, work.released.set).start()
    assert second.run("work", wait=timedelta(seconds=20)).outcome == "succeeded"
    runs.join()


def test_a_dry_run_leaves_no_trace_and_minds_no_run_elsewhere(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    crons = office.open(work)
    crons.run("work")
    assert crons.run("work", dry_run=True).dry_run
    assert len(rows(admin, "*")) == 1


def test_a_stop_ends_the_runs_after_the_batch_in_hand(office: Office, admin: psycopg.Connection) -> None:
    work = Work(released=False)
    crons = office.open(work, interval=1)
    crons.inject_crons()
    wait_for(lambda: work.runs)
    crons.close()
    assert rows(admin, "outcome, reason", "missed IS NULL") == [("aborted", "the process was asked to stop")]
    assert admin.execute("SELECT * FROM catfeeder_cron.daemons").fetchall() == []
    crons.close()


CONFIG = """
[database]
url = "{url}"
[jobs.clean-tokens]
enabled = {clean}
interval = 3600
[jobs.test-hello-world]
enabled = true
interval = 3600
"""


@pytest.fixture
def config(database_url: str, tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(url=database_url, clean="false"))
    path.chmod(0o600)
    return path


def test_everything_is_opened_from_the_configuration_started_and_closed_again(config: Path) -> None:
    with Crons(config=config) as crons:
        assert crons.inject_crons() == 0
        tasks = tasks_of(crons)
        assert tasks.running
        ids = {task.id for task in tasks.tasks}
        assert "test-hello-world" in ids
        assert "clean-tokens" not in ids
        assert crons.inject_crons() == 0, "a second time, in place of the first"
        assert {task.id for task in tasks.tasks} == ids
    assert not tasks.running


def test_what_is_handed_in_is_used_and_stays_its_owners(config: Path, admin: psycopg.Connection) -> None:
    settings = load_settings(config)
    with BackgroundTasks() as tasks, Database(settings.database) as database:
        mine = tasks.add_task(print, trigger="interval", hours=1)
        with Crons(config=settings, database=database, background_tasks=tasks) as crons:
            assert crons.inject_crons() == 0
            assert not tasks.running, "its owner starts it"
            tasks.start()
            assert crons._test_hello_world() == 0
        assert tasks.running
        assert [task.id for task in tasks.tasks] == [mine.id], "what was put on it is taken off"
        assert rows(admin, "job, trigger, outcome") == [("test-hello-world", "manual", "succeeded")]
        assert database.query("SELECT 1", {}) == [(1,)]


def test_the_methods_named_after_jobs_run_them_now_enabled_or_not(config: Path, admin: psycopg.Connection) -> None:
    admin.execute('CREATE TABLE "Connections" (id int, expiration_date timestamptz)')
    admin.execute("""INSERT INTO "Connections" VALUES (1, now() - interval '1 h'), (2, now() + interval '1 h')""")
    with Crons(config=config) as crons:
        assert crons.clean_expired_tokens() == 0
        assert crons.clean_expired_verification_nodes() == 84, "there is no such table"
    assert admin.execute('SELECT id FROM "Connections"').fetchall() == [(2,)]
    assert rows(admin, "job, outcome") == [("clean-tokens", "succeeded"), ("clean-verification", "failed")]


def test_return_codes_are_the_callers_choice_and_nothing_raises_without_a_configuration(tmp_path: Path) -> None:
    broken = tmp_path / "config.toml"
    broken.write_text("[jobs.nonsense]\nintervall = 3\n")
    for path in (tmp_path / "missing.toml", broken):
        with Crons(config=path, error=7) as crons:
            assert crons.inject_crons() == 7
            for method in (
                crons.check_actions,
                crons.clean_expired_tokens,
                crons.clean_expired_verification_nodes,
                crons.renew_oaths,
                crons._test_hello_world,
                crons._test_current_date,
            ):
                assert method() == 7
        assert Crons(config=path).inject_crons() == 84


def test_without_a_database_the_jobs_are_scheduled_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(url="postgresql://localhost:1/nowhere", clean="false"))
    path.chmod(0o600)
    with Crons(config=path, success=1) as crons:
        assert crons.inject_crons() == 1
        assert crons._test_hello_world() == 84, "there is no ledger to write to"


def test_a_clock_that_was_put_back_does_not_keep_the_jobs_waiting(office: Office, admin: psycopg.Connection) -> None:
    work = Work()
    crons = office.open(work, interval=1)
    crons.inject_crons()
    wait_for(lambda: work.runs)
    tasks_of(crons)._scheduler.get_job("work").modify(next_run_time=datetime.now(UTC) + timedelta(hours=2))
    runs = work.runs
    crons._open().job_scheduler._downtime.seen(datetime.now(UTC) + timedelta(hours=2))
    heart(crons)
    wait_for(lambda: work.runs > runs + 1)


# Real processes, for what only they can show.

DAEMON = """
import dataclasses, sys, time
from pathlib import Path
from catfeeder_cron import logs
from catfeeder_cron.service import daemon
from catfeeder_cron.jobs import built_in, hello_world, load_settings

def run(context, settings):
    print("running", flush=True)
    while True:
        time.sleep(0.02)
        if sys.argv[2] == "obeys":
            context.checkpoint()

settings = load_settings(Path(sys.argv[1]))
logs.configure("info", "json")
daemon.run(settings, jobs=built_in() | {"test-hello-world": dataclasses.replace(hello_world.JOB, run=run)})
"""


@pytest.fixture
def start(tmp_path: Path, database_url: str) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a daemon whose job has begun, in a process that is killed at the end."""
    path = tmp_path / "daemon.toml"
    processes: list[subprocess.Popen[str]] = []

    def one(behaviour: str, grace: float = 60) -> "subprocess.Popen[str]":
        path.write_text(
            f'[database]\nurl = "{database_url}"\n[scheduler]\nshutdown_grace = {grace}\n'
            "[jobs.test-hello-world]\nenabled = true\ninterval = 1\n[jobs.clean-tokens]\nenabled = false\n"
            "[jobs.clean-verification]\nenabled = false\n"
        )
        path.chmod(0o600)
        command = [sys.executable, "-c", DAEMON, str(path), behaviour]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "running\n"
        return process

    yield one
    for process in processes:
        process.kill()
        process.communicate()


def last_run(admin: psycopg.Connection) -> tuple[Any, ...]:
    return rows(admin, "outcome, reason", "missed IS NULL")[-1]


def test_a_stopping_daemon_lets_its_jobs_end_their_batch_and_exits_with_0(
    start: Callable[..., "subprocess.Popen[str]"], admin: psycopg.Connection
) -> None:
    process = start("obeys")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 0
    assert last_run(admin) == ("aborted", "the process was asked to stop")


def test_after_the_grace_a_job_is_recorded_as_aborted_and_the_daemon_exits_with_0(
    start: Callable[..., "subprocess.Popen[str]"], admin: psycopg.Connection
) -> None:
    process = start("ignores", grace=1)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON) == 0
    assert time.monotonic() - begun >= 1
    assert last_run(admin) == ("aborted", "still running 1 s after the stop")
    assert admin.execute("SELECT * FROM catfeeder_cron.daemons").fetchall() == []


def test_after_the_grace_a_daemon_whose_database_does_not_answer_ends_all_the_same(
    start: Callable[..., "subprocess.Popen[str]"], admin: psycopg.Connection, connect: Callable[..., psycopg.Connection]
) -> None:
    process = start("ignores", grace=0.2)
    holder = connect(autocommit=False)
    holder.execute("LOCK TABLE catfeeder_cron.job_runs")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 0
    holder.rollback()


def test_a_second_signal_ends_the_daemon_at_once(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start("ignores")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == -signal.SIGTERM


def test_run_once_is_refused_with_75_while_a_daemon_runs_the_job_and_may_wait(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, admin: psycopg.Connection
) -> None:
    process = start("obeys")
    command = [sys.executable, "-m", "catfeeder_cron", "--config", str(tmp_path / "daemon.toml"), "run-once"]
    refused = subprocess.run([*command, "test-hello-world", "--json"], capture_output=True, text=True, check=False)
    assert refused.returncode == 75
    assert f"test-hello-world is running already: on {os.uname().nodename}, pid {process.pid}, since" in refused.stderr
    (told,) = json.loads(refused.stdout)
    assert (told["job"], told["outcome"]) == ("test-hello-world", "skipped")

    waiting = subprocess.Popen([*command, "test-hello-world", "--wait", "30s"], stdout=subprocess.PIPE)
    wait_for(lambda: admin.execute("SELECT count(*) FROM catfeeder_cron.daemons").fetchone() == (2,))
    process.send_signal(signal.SIGTERM)
    output, _ = waiting.communicate(timeout=SOON)
    assert waiting.returncode == 0
    assert output.startswith(b"test-hello-world: succeeded")
    assert rows(admin, "outcome, trigger", "trigger = 'manual'") == [("succeeded", "manual")]
