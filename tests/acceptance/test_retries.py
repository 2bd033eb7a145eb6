"""A job of one's own that failed is made again before its next slot: once for all daemons, whoever dies in between."""

import os
import signal
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from tests.support.program import Program
from tests.support.waiting import eventually

# A sequence is not rolled back: the first two runs divide by zero, the third succeeds.
TRIED = "SELECT 1 / CASE WHEN nextval('tries') < 3 THEN 0 ELSE 1 END"
RUNS = "SELECT trigger, outcome FROM catfeeder_cron.job_runs WHERE job = 'flaky' ORDER BY run_id"


def configure(program: Program, url: str, rest: str) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat(timespec="seconds")
    program.configure(url, f'[jobs.flaky]\nsql = "{TRIED}"\ndate = {soon}\n{rest}\n')


@pytest.mark.usefixtures("app_tables")
def test_a_fleet_makes_each_retry_once_until_the_job_succeeds(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    admin.execute("CREATE SEQUENCE tries")
    configure(program, database_url, 'retries = 5\nretry_after = "1s"')
    for daemon in (program.start("start"), program.start("start")):
        daemon.wait_for("daemon_started")

    eventually(lambda: ("retry", "succeeded") in admin.execute(RUNS).fetchall(), "a retry that succeeds")

    assert admin.execute(RUNS).fetchall() == [("schedule", "failed"), ("retry", "failed"), ("retry", "succeeded")]
    told = program.run("history", "flaky", "--json").document
    assert [run["trigger"] for run in told] == ["retry", "retry", "schedule"]
    assert len({run["slot"] for run in told}) == 1


@pytest.mark.usefixtures("app_tables")
def test_a_daemon_that_dies_after_a_failure_leaves_the_retry_to_the_others(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    admin.execute("CREATE SEQUENCE tries")
    configure(program, database_url, 'retries = 5\nretry_after = "3s"')
    first = program.daemon()
    eventually(lambda: admin.execute(RUNS).fetchall() == [("schedule", "failed")], "a failure")
    os.kill(first.pid, signal.SIGKILL)

    program.daemon()

    eventually(lambda: ("retry", "succeeded") in admin.execute(RUNS).fetchall(), "a retry that succeeds")
    assert admin.execute(RUNS).fetchall()[0] == ("schedule", "failed")
    assert admin.execute(RUNS).fetchall()[1:] == [("retry", "failed"), ("retry", "succeeded")]
