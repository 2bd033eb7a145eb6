"""`run-once`: what it prints and returns, and what it leaves in the database, however it ends."""

import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from catfeeder_cron.database.embedded import EmbeddedServer
from tests.support.program import ADD_CONNECTIONS, ASLEEP, SLOW_DOWN_DELETIONS, Finished, Program, command, count
from tests.support.waiting import eventually

INSTANT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"
EXPIRED = '"Connections" WHERE expiration_date < now()'
LIVE = '"Connections" WHERE expiration_date > now()'
UNDER_WAY = "catfeeder_cron.job_runs WHERE outcome IS NULL"


def one(finished: Finished) -> dict[str, Any]:
    (report,) = finished.document
    assert isinstance(report, dict)
    return report


def test_the_first_run_creates_the_ledger_deletes_what_has_expired_and_says_so(
    program: Program, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url)
    assert program.run("init-db", "--with-app-tables").status == 0
    admin.execute("DROP SCHEMA catfeeder_cron CASCADE")
    admin.execute(ADD_CONNECTIONS, {"expired": 300, "live": 200})
    admin.execute("""INSERT INTO "Connections" (token) VALUES ('never expires')""")

    tried = program.run("run-once", "clean-tokens", "--dry-run", "--json")
    assert (tried.status, tried.stderr) == (0, "")
    assert one(tried)["counts"] == {"would_delete": 300}
    assert one(tried)["dry_run"] is True
    assert count(admin, EXPIRED) == 300
    assert count(admin, "pg_namespace WHERE nspname = 'catfeeder_cron'") == 0

    words = program.run("run-once", "clean-tokens")
    assert (words.status, words.stderr) == (0, "")
    assert re.fullmatch(r"clean-tokens: succeeded, deleted 300, remaining 0 \(\d+\.\d\d s\)\n", words.stdout)
    assert (count(admin, EXPIRED), count(admin, '"Connections"')) == (0, 201)

    jobs = ["clean-tokens", "clean-verification", "test-hello-world"]
    several = program.run("run-once", *jobs, "--json")
    assert several.status == 0
    assert several.stderr.count("\n") == several.stderr.count("hello_world  ") == 1  # what a job itself has to say
    for job, report in zip(jobs, several.document, strict=True):
        assert report.keys() == {"job", "outcome", "reason", "counts", "started_at", "duration_seconds", "dry_run"}
        assert (report["job"], report["outcome"], report["reason"]) == (job, "succeeded", None)
        assert re.fullmatch(INSTANT, report["started_at"])
        assert isinstance(report["duration_seconds"], float)
        assert report["dry_run"] is False
    assert [report["counts"] for report in several.document[:2]] == [{"deleted": 0, "remaining": 0}] * 2

    recorded = admin.execute(
        "SELECT job, trigger, outcome, slot FROM catfeeder_cron.job_runs ORDER BY run_id"
    ).fetchall()
    assert recorded == [(job, "manual", "succeeded", None) for job in ("clean-tokens", *jobs)]


@pytest.mark.usefixtures("app_tables")
def test_a_failure_among_others_is_84_and_the_others_are_run(program: Program, admin: psycopg.Connection) -> None:
    admin.execute('DROP TABLE "Connections"')
    failed = program.run("run-once", "clean-tokens", "clean-verification", "--json")
    assert failed.status == 84
    first, second = failed.document
    assert (first["outcome"], second["outcome"]) == ("failed", "succeeded")
    assert 'no table "public"."Connections"' in first["reason"]
    assert failed.stderr.count("\n") == 1
    assert admin.execute("SELECT outcome, error FROM catfeeder_cron.job_runs ORDER BY run_id LIMIT 1").fetchone() == (
        "failed",
        first["reason"],
    )


@pytest.mark.usefixtures("app_tables")
def test_a_missing_column_and_a_column_of_the_wrong_type_are_told(program: Program, admin: psycopg.Connection) -> None:
    admin.execute('ALTER TABLE "Connections" RENAME expiration_date TO expires')
    admin.execute('ALTER TABLE "Verification" ALTER expiration TYPE text')
    failed = program.run("run-once", "clean-tokens", "clean-verification")
    assert failed.status == 84
    first, second = failed.stdout.splitlines()
    assert 'no column "expiration_date"' in first
    assert "expires" in first
    assert "is text, not a time" in second
    assert failed.stderr.count("\n") == 2


@pytest.mark.usefixtures("app_tables")
def test_what_a_role_lacks_is_told_with_the_grant_that_helps(
    program: Program, admin: psycopg.Connection, role: Callable[[], tuple[str, str]]
) -> None:
    name, url = role()
    program.configure(url)
    admin.execute(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA catfeeder_cron TO {name};"
        f'GRANT SELECT ON "Connections" TO {name}'.encode()
    )
    failed = program.run("run-once", "clean-tokens")
    assert failed.status == 84
    assert failed.stderr.count("\n") == 1
    (grant,) = re.findall(rf'GRANT .* TO "{name}"', failed.stdout)
    admin.execute(grant)
    assert program.run("run-once", "clean-tokens").status == 0

    admin.execute("DROP SCHEMA catfeeder_cron CASCADE")
    failed = program.run("run-once", "clean-tokens")
    assert failed.status == 84
    assert "init-db" in failed.error


@pytest.mark.usefixtures("app_tables")
def test_a_job_that_runs_elsewhere_is_75_waited_for_on_request_and_ends_its_batch_on_sigterm(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, "[jobs.clean-tokens]\nbatch_size = 10\n")
    admin.execute(SLOW_DOWN_DELETIONS.replace("0.1", "0.5"))  # for minutes
    admin.execute(ADD_CONNECTIONS, {"expired": 4000, "live": 1000})
    working = program.start("run-once", "clean-tokens", "--json")
    eventually(lambda: count(admin, EXPIRED) < 4000, "a batch")

    refused = program.run("run-once", "clean-tokens", "--wait", "1s", "--json")
    assert refused.status == 75
    assert f"pid {working.pid}" in refused.error
    assert (one(refused)["outcome"], one(refused)["counts"]) == ("skipped", {})
    assert program.run("run-once", "clean-tokens", "--dry-run").status == 0
    mixed = program.run("run-once", "clean-tokens", "test-hello-world")
    assert mixed.status == 75
    assert "test-hello-world: succeeded" in mixed.stdout

    waiting = program.start("run-once", "clean-tokens", "--wait", "10m", "--json")
    impatient = program.start("run-once", "clean-tokens", "--wait", "10m", "--json")
    eventually(lambda: count(admin, "catfeeder_cron.daemons") == 3, "those who wait")
    given_up = impatient.stop()
    assert given_up.status == 84
    assert one(given_up)["outcome"] == "aborted"

    working.signal(signal.SIGTERM)
    stopped = working.finish()
    assert stopped.status == 84
    assert one(stopped)["outcome"] == "aborted"
    deleted = one(stopped)["counts"]["deleted"]
    assert 0 < deleted < 4000

    eventually(lambda: count(admin, UNDER_WAY) == 1, "the second run")
    admin.execute('DROP TRIGGER slow ON "Connections"')
    finished = waiting.finish()
    assert finished.status == 0
    assert one(finished)["counts"]["deleted"] == 4000 - deleted
    assert (count(admin, EXPIRED), count(admin, LIVE)) == (0, 1000)
    recorded = admin.execute(
        "SELECT outcome, counts FROM catfeeder_cron.job_runs WHERE job = 'clean-tokens' ORDER BY run_id"
    ).fetchall()
    assert [outcome for outcome, _ in recorded] == ["aborted", "succeeded"]
    assert recorded[0][1]["deleted"] == deleted


@pytest.mark.usefixtures("app_tables")
def test_a_run_that_uses_up_its_time_is_stopped_and_recorded(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, "[jobs.clean-tokens]\ntimeout = 3\nbatch_size = 10\n")
    admin.execute(SLOW_DOWN_DELETIONS)
    admin.execute(ADD_CONNECTIONS, {"expired": 10_000, "live": 0})
    failed = program.run("run-once", "clean-tokens", "--json")
    assert failed.status == 84
    assert one(failed)["outcome"] == "timed_out"
    assert "timeout of 3 s" in one(failed)["reason"]
    assert 0 < one(failed)["counts"]["deleted"] == 10_000 - count(admin, EXPIRED)
    (recorded,) = program.run("history", "--json").document
    assert {key: recorded[key] for key in ("outcome", "reason", "counts", "trigger")} == {
        **{key: one(failed)[key] for key in ("outcome", "reason", "counts")},
        "trigger": "manual",
    }


@pytest.mark.usefixtures("app_tables")
def test_a_second_signal_ends_a_run_at_once(program: Program, admin: psycopg.Connection) -> None:
    admin.execute(SLOW_DOWN_DELETIONS.replace("0.1", "5"))
    admin.execute(ADD_CONNECTIONS, {"expired": 1000, "live": 0})
    working = program.start("run-once", "clean-tokens")
    eventually(lambda: count(admin, ASLEEP), "a batch in hand")
    # Two at the same instant would be one to the kernel.
    while working.process.poll() is None:
        working.signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            working.process.wait(0.3)
    assert working.finish().status == -signal.SIGINT
    assert count(admin, EXPIRED) == 1000


@pytest.mark.usefixtures("app_tables")
def test_progress_is_drawn_on_a_terminal(program: Program, admin: psycopg.Connection) -> None:
    admin.execute(SLOW_DOWN_DELETIONS)
    admin.execute(ADD_CONNECTIONS, {"expired": 1000, "live": 0})
    status, shown = program.run_on_terminal("run-once", "clean-tokens")
    assert status == 0
    assert "━" in shown
    assert re.search(r"\d+/\d+", shown)
    assert "clean-tokens: succeeded, deleted 1000, remaining 0" in shown


@pytest.mark.parametrize("lines", ["", "[logging]\nlevel = 'debug'\n"])
def test_on_a_terminal_a_failure_is_told_by_the_result_alone(
    program: Program, app_tables: None, admin: psycopg.Connection, database_url: str, lines: str
) -> None:
    program.configure(database_url, lines)
    admin.execute('DROP TABLE "Connections"')
    reason = 'there is no table "public"."Connections"'

    status, shown = program.run_on_terminal("run-once", "clean-tokens")

    assert status == 84
    assert f"clean-tokens: failed, {reason}" in shown
    assert shown.count(reason) == (2 if lines else 1)  # debugging, one wants to see the entries
    # Where only the result is piped away, the terminal shows the error.
    program.configure(database_url)
    call = shlex.join([*command(), "run-once", "clean-tokens"])
    _, shown = program.run_command_on_terminal("sh", "-c", f"{call} > result")
    assert shown.count(reason) == 1
    assert reason in (program.folder / "result").read_text()


def test_on_a_terminal_a_database_that_is_away_is_told_once(program: Program) -> None:
    program.configure("postgresql://cat@127.0.0.1:1/nowhere")

    status, shown = program.run_on_terminal("run-once", "clean-tokens")

    assert status == 84
    assert shown.count("Connection refused") == 1


def test_a_server_that_goes_away_in_the_middle_is_one_line_and_finished_batches_stay(
    program: Program, own_server: EmbeddedServer
) -> None:
    program.configure(own_server.conninfo)
    assert program.run("init-db", "--with-app-tables").status == 0
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute(SLOW_DOWN_DELETIONS)
        admin.execute(ADD_CONNECTIONS, {"expired": 4000, "live": 1000})
        working = program.start("run-once", "clean-tokens", "--json")
        eventually(lambda: count(admin, EXPIRED) < 4000, "a batch")
    own_server.stop()
    failed = working.finish()
    assert failed.status == 84
    assert one(failed)["outcome"] == "failed"
    assert "Traceback" not in failed.stderr
    deleted = one(failed)["counts"]["deleted"]

    own_server.start(durable=False)
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        assert count(admin, LIVE) == 1000
        # What a batch that was cut off in its COMMIT has done, nobody can know.
        assert 0 < deleted <= 4000 - count(admin, EXPIRED)
    # The run that could not be recorded is closed when its process has not been heard of for a while, not before.
    assert program.run("run-once", "clean-verification").status == 0


def test_a_wrong_password_is_one_line_that_does_not_repeat_it(program: Program, own_server: EmbeddedServer) -> None:
    program.configure(own_server.conninfo)
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute("CREATE ROLE cat LOGIN PASSWORD 'right'")
        ((hba,),) = admin.execute("SHOW hba_file").fetchall()
        rules = Path(hba)
        rules.write_text("local all cat scram-sha-256\n" + rules.read_text())
        admin.execute("SELECT pg_reload_conf()")
    for arguments in (["run-once", "clean-tokens"], ["init-db"], ["history"]):
        program.configure(make_conninfo(own_server.conninfo, user="cat", password="hunter2"))
        failed = program.run(*arguments)
        assert failed.status == 84
        assert "password authentication failed" in failed.error
        assert "hunter2" not in failed.stdout + failed.stderr


@pytest.mark.usefixtures("app_tables")
def test_a_zone_of_the_environment_that_no_clock_can_show_changes_nothing(program: Program) -> None:
    for words in (["run-once", "renew-oauth", "clean-tokens"], ["status"], ["history"], ["list"]):
        ended = program.run(*words, variables={"TZ": "UTC+25"})
        assert (ended.status, ended.stderr) == (0, "")


def test_a_server_that_is_not_there_is_one_line(program: Program) -> None:
    program.configure("postgresql://cat@127.0.0.1:1/nowhere")
    for arguments in (["run-once", "clean-tokens"], ["history"], ["init-db"]):
        failed = program.run(*arguments)
        assert failed.status == 84
        assert "Connection refused" in failed.error
    tried = program.run("run-once", "clean-tokens", "--dry-run")
    assert (tried.status, tried.stderr.count("\n")) == (84, 1)
