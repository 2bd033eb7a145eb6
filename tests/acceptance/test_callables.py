"""A daemon whose jobs call Python: whatever a callable does, the daemon logs, schedules and stops as before."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from tests.support.processes import is_alive
from tests.support.program import ADD_CONNECTIONS, Program, command, count
from tests.support.waiting import eventually

CALLABLES = Path(__file__).parents[1] / "support" / "custom_callables.py"
# What becomes of a run that calls each of these.
ENDINGS = {
    "note": ("succeeded", None),
    "silence": ("succeeded", None),
    "close_the_streams": ("succeeded", None),
    "leave_behind": ("succeeded", None),
    "use_a_pool": ("succeeded", None),
    "fork_and_kill": ("succeeded", None),
    "fail_unheard_of": ("failed", "Unheard: see the log for the traceback"),
    "crash": ("failed", "its process was killed by SIGSEGV"),
    "never_end": ("timed_out", "longer than its timeout of 1 s; it did not end within 10 s and was killed"),
}

ENDED = """
    SELECT DISTINCT job, outcome, reason FROM catfeeder_cron.job_runs
    WHERE outcome IS NOT NULL AND missed IS NULL AND job = ANY (%s)"""
CLEANED = "catfeeder_cron.job_runs WHERE job = 'clean-tokens' AND outcome = 'succeeded'"


def path_of(program: Program) -> dict[str, str]:
    """Where its callables are found."""
    return {"PYTHONPATH": str(program.folder)}


@pytest.mark.usefixtures("app_tables")
def test_nothing_that_a_callable_does_reaches_the_daemon(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    shutil.copy(CALLABLES, program.folder / "feeders.py")
    jobs = "".join(
        f'[jobs.{function.replace("_", "-")}]\ncall = "feeders:{function}"\ninterval = 4\ntimeout = {timeout}\n'
        for function, timeout in {**dict.fromkeys(ENDINGS, 60), "never_end": 1}.items()
    )
    rest = "[jobs.clean-tokens]\ninterval = 1\n[scheduler]\nmax_workers = 12\n"
    program.configure(database_url, jobs + rest)
    daemon = program.start("start", variables=path_of(program))
    daemon.wait_for("daemon_started")

    expected = {(function.replace("_", "-"), *ending) for function, ending in ENDINGS.items()}
    called = [[job for job, *_ in expected]]
    eventually(lambda: set(admin.execute(ENDED, called).fetchall()) >= expected, "a run of each", 120)
    assert set(admin.execute(ENDED, called).fetchall()) == expected
    before = count(admin, CLEANED)
    eventually(lambda: count(admin, CLEANED) > before + 1, "the schedule goes on")
    admin.execute(ADD_CONNECTIONS, {"expired": 1, "live": 0})
    daemon.wait_for("job_finished", job="clean-tokens", deleted=1, seconds=60)

    ended = daemon.stop(60)

    assert (ended.status, ended.stdout) == (0, "")
    assert daemon.events("daemon_stopped")
    assert count(admin, "catfeeder_cron.job_runs WHERE outcome IS NULL") == 0
    started = [json.loads(line) for line in (program.folder / "seen").read_text().splitlines()]
    pids = [pid for line in started if isinstance(line, list) for pid in line if isinstance(pid, int) and pid > 10]
    assert pids
    eventually(lambda: not any(map(is_alive, pids)), "the end of all that was started")


@pytest.mark.usefixtures("app_tables")
def test_a_daemon_that_is_killed_leaves_nothing_of_its_callables_behind(program: Program, database_url: str) -> None:
    shutil.copy(CALLABLES, program.folder / "feeders.py")
    program.configure(database_url, '[jobs.stay]\ncall = "feeders:never_end"\ninterval = 1\n')
    daemon = program.start("start", variables=path_of(program))
    seen = program.folder / "seen"
    eventually(lambda: seen.exists() and seen.read_text().endswith("\n"), "the callable at work")
    daemon.signal(signal.SIGKILL)
    daemon.finish()

    pids = json.loads(seen.read_text())
    eventually(lambda: not any(map(is_alive, pids)), "the end of all that was started")


@pytest.mark.usefixtures("app_tables")
def test_a_callable_that_does_not_end_is_killed_at_the_end_of_the_grace(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    shutil.copy(CALLABLES, program.folder / "feeders.py")
    program.configure(
        database_url, '[scheduler]\nshutdown_grace = 1\n[jobs.stay]\ncall = "feeders:never_end"\ninterval = 1\n'
    )
    daemon = program.start("start", variables=path_of(program))
    seen = program.folder / "seen"
    eventually(lambda: seen.exists() and seen.read_text().endswith("\n"), "the callable at work")

    assert daemon.stop(60).status == 0

    pids = json.loads(seen.read_text())
    eventually(lambda: not any(map(is_alive, pids)), "the end of all that was started")
    assert count(
        admin, "catfeeder_cron.job_runs WHERE outcome = 'aborted' AND reason = 'still running 1 s after the stop'"
    )


def test_check_finds_a_callable_that_does_no_good_while_it_is_imported(program: Program, database_url: str) -> None:
    (program.folder / "odd.py").write_text("import os\nos._exit(0)\n")
    (program.folder / "quiet.py").write_text(
        "import logging.config\nlogging.config.dictConfig({'version': 1})\nmain = 1\n"
    )
    program.configure(
        database_url,
        "".join(f'[jobs.{name}]\ncall = "{name}:main"\ninterval = 60\n' for name in ("odd", "quiet")),
    )
    checked = program.run("check", variables=path_of(program))

    assert checked.status == 84
    assert 'odd: "odd:main" can\'t be imported: its process ended with exit status 0' in checked.stdout
    assert 'quiet: "quiet:main" is int, expected something callable' in checked.stdout


IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.usefixtures("app_tables")
def test_as_the_first_process_of_a_container_it_reaps_orphans(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    if subprocess.run([*IN_A_CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no process namespace")
    (program.folder / "feeders.py").write_text(ORPHANS)
    program.configure(database_url, '[jobs.orphan]\ncall = "feeders:orphan"\ninterval = 1\n')
    container = program.start_command(*IN_A_CONTAINER, *command(), "start", variables=path_of(program))
    container.wait_for("daemon_started", seconds=60)
    (init,) = map(int, Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split())

    eventually(lambda: count(admin, ORPHANED) > 2, "runs that leave orphans")
    eventually(lambda: dead_children(init), "an orphan that has ended")
    assert program.run("pause", "orphan").status == 0
    eventually(lambda: not dead_children(init), "the end of all orphans")
    os.kill(init, signal.SIGTERM)
    assert container.finish(60).status == 0


ORPHANS = """
import os, subprocess

def orphan():
    # Without its guard nobody is left to take care of what it has started.
    subprocess.Popen(["sleep", "0.1"])
    os.kill(os.getppid(), 9)
"""
ORPHANED = "catfeeder_cron.job_runs WHERE job = 'orphan' AND outcome = 'failed'"


def dead_children(parent: int) -> list[str]:
    """The processes that have ended, and that this one would have to reap."""
    dead = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            told = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            if told["State"].startswith("Z") and told["PPid"] == str(parent):
                dead.append(status.parent.name)
    return dead
