"""What an operator does, with two daemons on one database: pause, resume, status, reload, check, custom jobs."""

import json
import platform
import re
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

import catfeeder_cron
from tests.support.program import Program, Running, count
from tests.support.waiting import eventually

TICK = """
[jobs.tick]
interval = 1
sql = "SELECT 1"
[jobs.tock]
interval = 1
sql = "SELECT 1"
[jobs.clean-tokens]
enabled = false
[jobs.clean-verification]
enabled = false
"""

MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
PAUSED = "catfeeder_cron.job_runs WHERE job IN ('tick', 'tock') AND reason = 'paused' AND missed > 0"

# Every slot of a job that falls into a stretch of time is a run or part of a missed stretch, once.
SLOTS = """
    SELECT slot, coalesce(last_slot, slot), coalesce(missed, 1), CASE WHEN missed > 0 THEN reason END
    FROM catfeeder_cron.job_runs
    WHERE job = %s AND slot IS NOT NULL ORDER BY slot"""


def history(program: Program, job: str, limit: int = 1000) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = program.run("history", job, "--limit", str(limit), "--json").document
    return runs


def last_run(admin: psycopg.Connection, job: str) -> int:
    row = admin.execute("SELECT coalesce(max(run_id), 0) FROM catfeeder_cron.job_runs WHERE job = %s", [job]).fetchone()
    assert row is not None
    return int(row[0])


def runs_since(admin: psycopg.Connection, job: str, run_id: int) -> int:
    return count(admin, f"catfeeder_cron.job_runs WHERE job = '{job}' AND missed IS NULL AND run_id > {run_id}")


def assert_no_slot_lost_or_doubled(admin: psycopg.Connection, job: str, at_least: int) -> None:
    rows = admin.execute(SLOTS, [job]).fetchall()
    assert sum(number for _, _, number, _ in rows) >= at_least
    for (_, last, _, _), (following, _, _, _) in pairwise(rows):
        assert (following - last).total_seconds() == 1, rows
    # A machine that is too busy to start a run in time passes its slot over, and says so: that is no loss.
    assert {reason for _, _, _, reason in rows} <= {None, "no daemon was free", "still running"}, rows


@pytest.fixture
def two(program: Program, app_tables: None, database_url: str, admin: psycopg.Connection) -> tuple[Running, Running]:
    """Two daemons that share two jobs of one second."""
    program.configure(database_url, TICK)
    daemons = program.start("start"), program.start("start")
    for daemon in daemons:
        daemon.wait_for("daemon_started")
    eventually(lambda: all(runs_since(admin, job, 0) for job in ("tick", "tock")), "both jobs run")
    return daemons


def test_a_pause_from_one_shell_stops_both_daemons_within_a_second(
    program: Program, two: tuple[Running, Running], admin: psycopg.Connection
) -> None:
    paused = program.run("pause", "tick", "--because", "the table is being moved")
    assert (paused.status, paused.stdout, paused.stderr) == (0, "paused: tick\n", "")
    before, other = last_run(admin, "tick"), last_run(admin, "tock")

    eventually(lambda: runs_since(admin, "tock", other) >= 3, "the other job goes on")
    # What was begun before the pause was committed may have got its number after we looked: no later one did.
    assert runs_since(admin, "tick", before) == 0
    listed = {job["job"]: job for job in program.run("list", "--json").document}
    assert (listed["tick"]["paused"], listed["tock"]["paused"]) == (True, False)
    told = rf"paused since {MOMENT} by {re.escape(platform.node())}: the table is being moved"
    assert re.search(told, program.run("list").stdout)
    assert re.search(told, program.run("status").stdout)
    stretch = history(program, "tick", 1)[0]
    assert (stretch["outcome"], stretch["reason"]) == ("skipped", "paused: the table is being moved")
    assert stretch["missed"] >= 2

    assert program.run("run-once", "tick").status == 0

    assert program.run("resume", "tick").stdout == "resumed: tick\n"
    resumed = last_run(admin, "tick")
    eventually(lambda: runs_since(admin, "tick", resumed) >= 2, "the job goes on")
    stretches = [run for run in history(program, "tick") if (run["reason"] or "").startswith("paused")]
    assert len(stretches) == 1


def test_a_pause_of_all_jobs_ends_by_itself(
    program: Program, two: tuple[Running, Running], admin: psycopg.Connection
) -> None:
    assert program.run("pause", "--for", "1h").stdout == "paused: all jobs\n"
    before = {job: last_run(admin, job) for job in ("tick", "tock")}

    jobs = program.run("status", "--json").document["jobs"]
    assert all(job["paused"] and job["paused_until"].endswith("Z") for job in jobs)
    assert all(job["paused_at"] < job["paused_until"] and job["paused_by"] == platform.node() for job in jobs)
    assert re.search(rf"paused since {MOMENT} until {MOMENT} by ", program.run("status").stdout)
    eventually(lambda: count(admin, PAUSED) == 2, "a slot of both goes by")
    assert not any(runs_since(admin, job, run_id) for job, run_id in before.items())
    # All but a second of the hour goes by.
    admin.execute("UPDATE catfeeder_cron.pauses SET until = now() + interval '1 s'")
    eventually(lambda: all(runs_since(admin, job, run_id) >= 1 for job, run_id in before.items()), "it is over")
    assert not any(job["paused"] for job in program.run("list", "--json").document)
    reasons = {run["reason"] for run in history(program, "tick") if run["missed"]}
    assert reasons == {"paused"}


def test_a_pause_lasts_over_restarts_and_nothing_is_caught_up_in_it(
    program: Program, app_tables: None, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url, TICK)
    first = program.daemon()
    eventually(lambda: runs_since(admin, "tick", 0) >= 1, "the job runs")
    program.run("pause", "tick", "tock")
    before = last_run(admin, "tick")
    assert first.stop().status == 0

    program.daemon()
    missed = "catfeeder_cron.job_runs WHERE job = 'tick' AND reason = 'paused' AND missed > 0"
    eventually(lambda: count(admin, missed), "slots are accounted for")
    assert runs_since(admin, "tick", before) == 0
    assert program.run("resume").stdout == "resumed: tick, tock\n"
    eventually(lambda: runs_since(admin, "tick", before) >= 1, "the job goes on")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["pause", "tik"], 'there is no job "tik"; the nearest is "tick"'),
        (["resume", "tik"], 'there is no job "tik"; the nearest is "tick"'),
        (["pause", "tick", "--for", "soon"], 'got "soon", expected a duration'),
        (["pause", "tick", "--for", "0s"], 'got "0s", expected longer than 0'),
        (["pause", "tick", "--for", "99999d"], "expected a duration"),
    ],
)
def test_wrong_usage_pauses_nothing(
    program: Program, app_tables: None, database_url: str, admin: psycopg.Connection, arguments: list[str], error: str
) -> None:
    program.configure(database_url, TICK)

    done = program.run(*arguments)

    assert done.status == 2
    assert error in done.error
    assert count(admin, "catfeeder_cron.pauses") == 0


def test_what_is_not_paused_by_name_is_told(program: Program, app_tables: None, database_url: str) -> None:
    program.configure(database_url, TICK)

    assert program.run("pause", "--for", "60").status == 0
    said = program.run("resume", "tick").stdout
    assert "resumed: nothing\nnot paused by name: tick\nall jobs are paused still" in said
    assert program.run("resume").stdout == "resumed: all jobs\n"


def test_status_tells_of_both_daemons_and_of_what_each_runs(
    program: Program, app_tables: None, database_url: str
) -> None:
    assert "no daemon is alive" in program.run("status").stdout
    program.configure(database_url, '[jobs.long]\ninterval = 1\nsql = "SELECT pg_sleep(30)"')
    daemons = {program.daemon().pid, program.daemon().pid}

    def running() -> Any:
        found = program.run("status", "--json").document["daemons"]
        return found if any(each["running"] for each in found) else None

    found = eventually(running, "the job is under way")
    assert {each["pid"] for each in found} == daemons
    assert all(each["alive"] and each["version"] == catfeeder_cron.__version__ for each in found)
    assert [run["job"] for each in found for run in each["running"]] == ["long"]
    assert "long for " in program.run("status").stdout


def test_a_reload_adds_removes_reschedules_and_leaves_running_jobs_alone(
    program: Program, app_tables: None, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(
        database_url,
        '[jobs.long]\ninterval = 1\nsql = "SELECT pg_advisory_xact_lock(1)"\n'
        '[jobs.going]\ninterval = 1\nsql = "SELECT 1"',
    )
    admin.execute("SELECT pg_advisory_lock(1)")
    daemon = program.daemon()
    eventually(lambda: count(admin, "catfeeder_cron.job_runs WHERE job = 'long' AND outcome IS NULL"), "it runs")
    eventually(lambda: runs_since(admin, "going", 0), "the other one runs")

    program.configure(database_url, '[jobs.coming]\ncron = "* * * * *"\nsql = "SELECT 1"\n[logging]\nlevel = "debug"')
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    before = last_run(admin, "going")
    admin.execute("SELECT pg_advisory_unlock(1)")

    eventually(lambda: count(admin, "catfeeder_cron.job_runs WHERE job = 'long' AND outcome = 'succeeded'"), "it ends")
    assert count(admin, "catfeeder_cron.schedule WHERE job = 'coming' AND trigger = 'cron * * * * * (UTC)'") == 1
    assert count(admin, "catfeeder_cron.schedule WHERE job = 'going'") == 0

    program.configure(database_url, '[jobs.coming]\ninterval = 1\nsql = "SELECT 1"\n[logging]\nlevel = "debug"')
    daemon.signal(signal.SIGHUP)
    eventually(lambda: runs_since(admin, "coming", 0) >= 2, "the new schedule holds")
    assert runs_since(admin, "going", before) == 0
    assert daemon.stop().status == 0


def test_a_faulty_file_is_refused_with_all_its_faults_and_the_old_one_stays(
    program: Program, app_tables: None, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url, TICK)
    daemon = program.daemon()

    program.configure(database_url, "[jobs.tick]\ninterval = 0\nsql = 'SELECT 1'\n[scheduler]\nmax_worker = 1")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reload_refused", count=2)

    told = daemon.events("reload_refused", level="error", in_force="the old configuration")
    assert len(told) == 2
    assert any("jobs.tick.interval" in entry["fault"] for entry in told)
    assert any("did you mean `max_workers`?" in entry["fault"] for entry in told)
    before = last_run(admin, "tick")
    eventually(lambda: runs_since(admin, "tick", before), "the old schedule stays")


def test_a_reload_reads_the_file_that_was_found_at_the_start(
    program: Program, app_tables: None, database_url: str
) -> None:
    found = program.configure(database_url, TICK)
    daemon = program.daemon()

    found.rename(program.folder / "moved.toml")
    daemon.signal(signal.SIGHUP)

    assert daemon.wait_for("reload_refused")["fault"].startswith(f"{found}: no such file")


def test_a_reload_that_the_database_refuses_is_incomplete_and_not_called_anything_else(
    program: Program, app_tables: None, database_url: str, admin: psycopg.Connection
) -> None:
    program.configure(database_url, TICK)
    daemon = program.daemon()
    eventually(lambda: runs_since(admin, "tick", 0), "the schema is there")

    program.configure(database_url, f'{TICK}[jobs.more]\ninterval = 3600\nsql = "SELECT 1"')
    admin.execute("ALTER TABLE catfeeder_cron.schedule RENAME TO away")
    daemon.signal(signal.SIGHUP)
    assert "schedule" in daemon.wait_for("reload_incomplete", level="error")["reason"]
    admin.execute("ALTER TABLE catfeeder_cron.away RENAME TO schedule")
    program.configure(database_url, "")
    daemon.signal(signal.SIGHUP)

    daemon.wait_for("reloaded", jobs=4)
    assert len(daemon.events("reloaded")) == 1


def test_what_needs_a_restart_is_said_key_by_key(program: Program, app_tables: None, database_url: str) -> None:
    program.configure(database_url, TICK)
    daemon = program.daemon()

    program.configure(
        database_url,
        'pool_max_size = 5\n[database.tables]\nschema = "x"\n[scheduler]\nmax_workers = 7\nshutdown_grace = 9\n'
        f"[metrics]\nlisten = '127.0.0.1:0'\n{TICK}\n[jobs.report]\ncall = 'nowhere:main'\ninterval = 3600",
    )
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("check_finding", subject="report", level="error")
    daemon.wait_for("restart_needed", count=3)

    said = [entry["key"] for entry in daemon.events("restart_needed")]
    assert said == ["database.pool_max_size", "scheduler.max_workers", "metrics.listen"]


@pytest.mark.parametrize(
    ("reloads", "slots"), [pytest.param(25, 4, id="short"), pytest.param(50, 8, id="long", marks=pytest.mark.proof)]
)
def test_a_reload_under_load_loses_and_doubles_no_slot(
    program: Program, app_tables: None, database_url: str, admin: psycopg.Connection, reloads: int, slots: int
) -> None:
    # Without catching up, a slot that is taken for one that went by is lost.
    jobs = TICK.replace('sql = "SELECT 1"', 'sql = "SELECT 1"\ncatch_up = false')
    configurations = [f"{jobs}\n[jobs.other{n}]\ninterval = {n + 1}\nsql = 'SELECT 1'" for n in range(2)]
    program.configure(database_url, configurations[0])
    daemons = program.daemon(), program.daemon()
    eventually(lambda: runs_since(admin, "tick", 0), "the job runs")

    for number in range(reloads):
        program.configure(database_url, configurations[number % 2], path="next.toml").rename(
            program.folder / "config.toml"
        )
        for daemon in daemons:
            daemon.signal(signal.SIGHUP)
        time.sleep(0.1)

    before = last_run(admin, "tick")
    eventually(lambda: runs_since(admin, "tick", before) >= 2, "the jobs go on")
    for daemon in daemons:
        assert daemon.events("reloaded")
        assert daemon.stop().status == 0
        assert not daemon.events("job_raised")
        assert "Traceback" not in daemon.stderr
    for job in ("tick", "tock"):
        assert_no_slot_lost_or_doubled(admin, job, at_least=slots)


GRANTS = """
    GRANT SELECT, UPDATE, DELETE ON "Connections", "Verification" TO {role};
    GRANT SELECT, UPDATE ON "ActiveOauths", "Actions" TO {role};
    GRANT SELECT ON "Services", "UserOauthConnection" TO {role};
    GRANT INSERT ON "ActionLog" TO {role};
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA catfeeder_cron TO {role}"""


@pytest.fixture
def make_role(admin: psycopg.Connection, role: Callable[[], tuple[str, str]]) -> Callable[[str], str]:
    def make(grants: str) -> str:
        name, url = role()
        admin.execute(grants.format(role=name).encode())
        return url

    return make


def test_a_least_privileged_role_works_from_end_to_end(
    program: Program, app_tables: None, admin: psycopg.Connection, make_role: Callable[[str], str]
) -> None:
    program.configure(make_role(GRANTS), '[jobs.clean-tokens]\ninterval = 1\n[scheduler]\nhistory_keep = "1s"')
    admin.execute("INSERT INTO \"Connections\" (token, expiration_date) VALUES ('t', now() - interval '1 day')")

    assert program.run("check").status == 0
    daemon = program.daemon()
    eventually(lambda: not count(admin, '"Connections"'), "the job cleans")
    assert program.run("pause", "clean-tokens").status == 0
    assert program.run("resume").status == 0
    assert program.run("history").status == 0
    assert program.run("status").status == 0
    assert program.run("run-once", "clean-tokens", "clean-verification").status == 0
    assert daemon.stop().status == 0
    assert not [line for line in daemon.stderr.splitlines() if json.loads(line)["level"] == "error"]


def test_a_role_with_too_little_is_told_what_it_lacks_by_check_and_at_the_start(
    program: Program, app_tables: None, make_role: Callable[[str], str]
) -> None:
    program.configure(make_role(GRANTS.replace("SELECT, UPDATE, DELETE ON", "SELECT ON")))

    done = program.run("check", "--json")
    errors = {each["subject"]: each["message"] for each in done.document if each["level"] == "error"}
    assert done.status == 84
    assert done.stderr == ""
    assert set(errors) == {"clean-tokens", "clean-verification"}
    assert 'lacks UPDATE, DELETE on "public"."Connections"; its owner can say: GRANT' in errors["clean-tokens"]

    daemon = program.daemon()
    for job in errors:
        assert daemon.wait_for("check_finding", subject=job, level="error")["message"] == errors[job]


def test_last_runs_that_a_role_may_not_see_are_no_jobs_that_never_ran(
    program: Program, app_tables: None, admin: psycopg.Connection, make_role: Callable[[str], str]
) -> None:
    program.configure(make_role("GRANT USAGE ON SCHEMA catfeeder_cron TO {role}"))
    admin.execute("REVOKE SELECT ON catfeeder_cron.job_runs FROM PUBLIC")

    listed = program.run("list")

    assert listed.status == 0
    assert "last_runs_unknown" in listed.stderr
    assert "permission denied for table job_runs" in listed.stderr


def test_check_tells_the_faults_of_a_configuration_as_a_document_too(program: Program) -> None:
    program.configure("postgresql:///x", "[jobs.clean-tokens]\nintervall = 5")

    done = program.run("check", "--json")

    assert (done.status, done.stderr) == (84, "")
    assert [(each["level"], each["subject"]) for each in done.document] == [("error", "configuration")]
    assert "did you mean `interval`?" in done.document[0]["message"]


def test_check_needs_no_database_to_say_so(program: Program) -> None:
    program.configure("postgresql://127.0.0.1:1/none")

    done = program.run("check")

    assert done.status == 84
    assert done.stderr == ""
    assert "error:   database: no connection to the database" in done.stdout


REPORT = """
import sys, threading
def main(days):
    print("printed", days)
    thread = threading.Thread(target=print, args=("by a thread",))
    thread.start()
    thread.join()
def leave():
    sys.exit(3)
"""


def test_a_custom_job_is_a_job_like_any_other(program: Program, app_tables: None, database_url: str) -> None:
    (program.folder / "reports.py").write_text(REPORT)
    path = {"PYTHONPATH": f"{program.folder}:{Path(catfeeder_cron.__file__).parents[1]}"}
    program.configure(
        database_url,
        "[jobs.report]\ncall = 'reports:main'\nkwargs = { days = 2 }\ncron = '0 3 * * *'\n"
        "[jobs.leave]\ncall = 'reports:leave'\ndate = 2100-01-01T00:00:00Z\n"
        "[jobs.broken]\ncall = 'reports:nobody'\ninterval = 3600",
    )

    done = program.run("run-once", "report", "--json", variables=path)
    assert (done.status, done.document[0]["outcome"]) == (0, "succeeded")
    assert done.stderr.count("job=report") == 2
    assert "by a thread" in done.stderr
    assert program.run("run-once", "report", "--dry-run", variables=path).stdout.startswith("report: skipped, a Python")
    assert program.run("run-once", "leave", variables=path).status == 84
    broken = program.run("run-once", "broken", variables=path)
    assert broken.status == 84
    assert '"reports:nobody" can\'t be imported: AttributeError' in broken.stdout
    assert [run["job"] for run in history(program, "report")] == ["report"]
    triggers = {job["job"]: job["trigger"] for job in program.run("list", "--json").document}
    assert (triggers["report"], triggers["leave"]) == ("cron 0 3 * * * (UTC)", "once at 2100-01-01T00:00:00Z")
    checked = program.run("check", variables=path)
    assert checked.status == 84
    assert 'error:   broken: "reports:nobody" can\'t be imported' in checked.stdout
    daemon = program.start("start", variables=path)
    daemon.wait_for("check_finding", subject="broken", level="error")


def test_the_shell_completes_and_every_help_has_an_example(program: Program) -> None:
    # By itself typer looks which shell it was started from.
    given = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = program.run("--show-completion", "bash", variables=given)
    assert "_CATFEEDER_CRON_COMPLETE=complete_bash" in shown.stdout
    assert "_catfeeder_cron_completion catfeeder-cron" in shown.stdout
    asked = {"_CATFEEDER_CRON_COMPLETE": "complete_bash", "COMP_WORDS": "catfeeder-cron pa", "COMP_CWORD": "1"}
    completed = program.run(variables=asked)
    assert completed.stdout.split() == ["pause"]
    for command in ("start", "list", "run-once", "status", "pause", "resume", "check", "history", "init-db"):
        shown = program.run(command, "--help")
        assert shown.status == 0
        assert "For example: catfeeder-cron" in " ".join(shown.stdout.split()), command
