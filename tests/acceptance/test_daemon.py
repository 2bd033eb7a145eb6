"""`start`: the schedule at work, its signals, the database that comes and goes, and what `list` and `history` tell.

Each daemon loads what it needs, as it does in use.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from catfeeder_cron.database.embedded import EmbeddedServer
from tests.support.program import ADD_CONNECTIONS, ASLEEP, SLOW_DOWN_DELETIONS, Program, count
from tests.support.waiting import eventually

EVERY_SECOND = """
    [jobs.clean-tokens]
    interval = 1
    batch_size = 100
    [jobs.clean-verification]
    interval = "1h"
    """
EXPIRED = '"Connections" WHERE expiration_date < now()'
INSTANT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"
HISTORY_KEYS = {
    *("job", "outcome", "reason", "counts", "started_at", "duration_seconds", "dry_run"),
    *("run_id", "slot", "trigger", "host", "pid", "daemon", "first_slot", "last_slot", "missed"),
}


@pytest.mark.usefixtures("app_tables")
def test_daemons_share_the_slots_and_history_and_list_tell_them(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, EVERY_SECOND)
    admin.execute(ADD_CONNECTIONS, {"expired": 250, "live": 50})
    daemons = [program.start_installed("start"), program.start_installed("start")]
    for daemon in daemons:
        daemon.wait_for("daemon_started")
    by_schedule = "catfeeder_cron.job_runs WHERE trigger = 'schedule' AND outcome = 'succeeded'"
    eventually(lambda: count(admin, by_schedule) >= 4, "four slots")
    assert (count(admin, EXPIRED), count(admin, '"Connections"')) == (0, 50)
    daemons[0].signal(signal.SIGTERM)
    daemons[1].signal(signal.SIGINT)
    for daemon in daemons:
        ended = daemon.finish()
        assert (ended.status, ended.stdout) == (0, "")
        for line in ended.stderr.splitlines():
            assert {"timestamp", "level", "event"} <= json.loads(line).keys()
        daemon.wait_for("daemon_stopping")
        daemon.wait_for("daemon_stopped")
    (finished,) = (entry for daemon in daemons for entry in daemon.events("job_finished"))
    assert (finished["job"], finished["outcome"], finished["deleted"]) == ("clean-tokens", "succeeded", 250)

    slots = admin.execute(
        "SELECT slot, coalesce(last_slot, slot) FROM catfeeder_cron.job_runs WHERE job = 'clean-tokens' ORDER BY slot"
    ).fetchall()
    steps = {(following - last).total_seconds() for (_, last), (following, _) in pairwise(slots)}
    assert steps == {1}, "a slot ran twice, or not at all"

    listed = {job["job"]: job for job in program.run("list", "--json").document}
    assert re.fullmatch(INSTANT, listed["clean-tokens"]["last_run"])
    assert listed["clean-tokens"]["last_outcome"] == "succeeded"
    assert listed["clean-verification"]["last_run"] is None

    runs = program.run("history", "clean-tokens", "--limit", "100", "--json").document
    for run in runs:
        assert run.keys() == HISTORY_KEYS
    runs = [run for run in runs if not run["missed"]]  # a busy machine may pass a slot over, and says so
    for run in runs:
        assert re.fullmatch(INSTANT, run["slot"])
        assert run["pid"] in {daemon.pid for daemon in daemons}
        assert (run["trigger"], run["dry_run"]) in (("schedule", False), ("catch_up", False))
    started = [datetime.fromisoformat(run["started_at"]) for run in runs]
    assert started == sorted(started, reverse=True)
    assert sum(run["counts"].get("deleted", 0) for run in runs) == 250
    assert len(program.run("history", "--limit", "2", "--json").document) == 2

    words = program.run("history")
    assert "\x1b" not in words.stdout
    assert re.split("  +", words.stdout)[:4] == ["RUN", "JOB", "SLOT (UTC)", "TRIGGER"]
    assert re.search(
        r"^clean-tokens: \d+ succeeded, median \d+\.\d\d s, longest \d+\.\d\d s$", words.stdout, re.MULTILINE
    )
    status, drawn = program.run_on_terminal("history")
    assert status == 0
    assert "│" in drawn


@pytest.mark.usefixtures("app_tables")
def test_what_was_missed_is_accounted_for_and_made_up_for_once(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, EVERY_SECOND)
    daemon = program.daemon(installed=True)
    eventually(lambda: count(admin, "catfeeder_cron.schedule"), "the accounts")
    daemon.stop()
    admin.execute(
        "UPDATE catfeeder_cron.schedule SET accounted_until = accounted_until - interval '10 minutes' "
        "WHERE job = 'clean-tokens'"
    )
    daemon = program.daemon(installed=True)
    caught_up = "catfeeder_cron.job_runs WHERE job = 'clean-tokens' AND trigger = 'catch_up'"
    eventually(lambda: count(admin, caught_up), "the run that was overdue")
    daemon.stop()
    assert count(admin, caught_up) == 1
    missed = [
        run for run in program.run("history", "clean-tokens", "--limit", "100", "--json").document if run["missed"]
    ]
    for run in missed:
        assert run.keys() == HISTORY_KEYS
        assert (run["outcome"], run["counts"], run["duration_seconds"]) == ("skipped", {}, None)
        assert re.fullmatch(INSTANT, run["first_slot"])
        assert re.fullmatch(INSTANT, run["last_slot"])
    (asleep,) = (run for run in missed if run["missed"] > 500)
    assert asleep["reason"] == "no daemon alive"
    assert f"{asleep['missed']} slots until" in program.run("history", "--limit", "100").stdout


@pytest.mark.usefixtures("app_tables")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_batch_in_hand_end_and_exits_0(
    program: Program, admin: psycopg.Connection, database_url: str, number: signal.Signals
) -> None:
    program.configure(database_url, EVERY_SECOND.replace("batch_size = 100", "batch_size = 10"))
    admin.execute(SLOW_DOWN_DELETIONS)
    admin.execute(ADD_CONNECTIONS, {"expired": 20_000, "live": 10})  # for minutes
    daemon = program.daemon(installed=True)
    eventually(lambda: count(admin, EXPIRED) < 20_000, "a batch")
    assert program.run("run-once", "clean-tokens").status == 75
    running = {job["job"]: job["last_outcome"] for job in program.run("list", "--json").document}
    assert running["clean-tokens"] == "running"
    daemon.signal(number)
    assert daemon.finish().status == 0
    assert daemon.wait_for("daemon_stopping")["running"] == ["clean-tokens"]
    left = count(admin, EXPIRED)
    assert 0 < left < 20_000
    row = admin.execute(
        "SELECT outcome, reason, counts FROM catfeeder_cron.job_runs WHERE job = 'clean-tokens' AND missed IS NULL"
    ).fetchone()
    assert row is not None
    assert row[0] == "aborted"
    assert "stop" in row[1]
    assert row[2]["deleted"] == 20_000 - left
    assert count(admin, "catfeeder_cron.daemons") == 0


@pytest.mark.usefixtures("app_tables")
def test_a_second_signal_ends_it_at_once_and_the_grace_is_bounded(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    admin.execute(SLOW_DOWN_DELETIONS.replace("0.1", "60"))
    admin.execute(ADD_CONNECTIONS, {"expired": 1000, "live": 0})
    for grace, ended_by in ((60, -signal.SIGTERM), (0.2, 0)):
        program.configure(database_url, f"[scheduler]\nshutdown_grace = {grace}\n{EVERY_SECOND}")
        daemon = program.daemon(installed=True)
        eventually(lambda: count(admin, ASLEEP), "a batch in hand")
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("daemon_stopping")
        if ended_by:
            daemon.signal(signal.SIGTERM)
        assert daemon.finish().status == ended_by
        admin.execute(f"SELECT pg_terminate_backend(pid) FROM {ASLEEP}".encode())
        if not ended_by:
            assert daemon.events("shutdown_grace_is_over")
        # What a process that was killed left open is closed when it was not heard of for a while; not to be waited for.
        admin.execute("UPDATE catfeeder_cron.job_runs SET outcome = 'aborted' WHERE outcome IS NULL")
    recorded = admin.execute(
        "SELECT outcome, reason FROM catfeeder_cron.job_runs"
        " WHERE job = 'clean-tokens' AND missed IS NULL ORDER BY run_id DESC LIMIT 1"
    ).fetchone()
    assert recorded == ("aborted", "still running 0.2 s after the stop")


def test_a_database_that_comes_later_and_goes_away_is_told_once_and_the_daemon_goes_on(
    program: Program, own_server: EmbeddedServer
) -> None:
    program.configure(own_server.conninfo, EVERY_SECOND)
    assert program.run("init-db", "--with-app-tables").status == 0
    own_server.stop()

    daemon = program.daemon(installed=True)
    daemon.wait_for("database_unreachable")
    own_server.start(durable=False)
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute(ADD_CONNECTIONS, {"expired": 10, "live": 10})
    daemon.wait_for("job_finished", job="clean-tokens", outcome="succeeded", deleted=10)
    assert len(daemon.events("database_unreachable")) == 1
    assert len(daemon.events("database_reachable_again")) == 1

    own_server.stop()
    daemon.wait_for("database_unreachable", count=2)
    with suppress(subprocess.TimeoutExpired):  # two slots go by
        daemon.process.wait(2.5)
    own_server.start(durable=False)
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute(ADD_CONNECTIONS, {"expired": 20, "live": 10})
        daemon.wait_for("job_finished", job="clean-tokens", outcome="succeeded", deleted=20)
        assert len(daemon.events("database_unreachable")) == 2
        missed = "catfeeder_cron.job_runs WHERE reason = 'database unreachable' AND missed > 0"
        eventually(lambda: count(admin, missed), "the account of the outage")
    own_server.stop()
    daemon.wait_for("database_unreachable", count=3)
    assert daemon.stop().status == 0, "a stop needs no database"


@pytest.mark.usefixtures("embedded_alone")
def test_a_daemon_and_run_once_share_an_embedded_database_and_the_last_one_stops_it(program: Program) -> None:
    program.configure("embedded:pg", EVERY_SECOND)
    daemon = program.start_installed("start")
    first = program.run("init-db", "--with-app-tables")
    assert first.status == 0
    daemon.wait_for("daemon_started")
    assert program.run("run-once", "clean-verification").status == 0
    listed = {job["job"]: job["last_outcome"] for job in program.run("list", "--json").document}
    assert listed["clean-verification"] == "succeeded"
    assert (program.folder / "pg/data/postmaster.pid").exists()
    assert daemon.stop().status == 0
    assert not (program.folder / "pg/data/postmaster.pid").exists()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a name short enough for a socket in it."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.usefixtures("embedded_alone")
def test_the_demo_shows_deletions_and_ctrl_c_leaves_nothing_behind(program: Program, temporary: Path) -> None:
    demo = program.start_installed("demo", variables={"TMPDIR": str(temporary)})
    for text in ("demo_ready", "job=clean-tokens", "job=clean-verification"):
        demo.wait_for_text(text)
    server = int(next(temporary.glob("*/data/postmaster.pid")).read_text().splitlines()[0])
    os.killpg(demo.pid, signal.SIGINT)
    ended = demo.finish()
    assert ended.status == 0
    assert "Traceback" not in ended.stderr
    assert re.search(r"deleted=[1-9]\d*", ended.stderr)
    assert list(temporary.iterdir()) == []
    command_line = Path(f"/proc/{server}/cmdline")
    assert not command_line.exists() or not command_line.read_bytes(), "the server runs on"


@pytest.mark.usefixtures("embedded_alone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_interrupted_while_it_is_set_up_leaves_nothing_behind(
    program: Program, temporary: Path, number: signal.Signals
) -> None:
    demo = program.start_installed("demo", variables={"TMPDIR": str(temporary)})
    eventually(lambda: list(temporary.glob("*/data*")), "the database being made")
    os.killpg(demo.pid, number)
    ended = demo.finish()
    assert ended.status == 0
    assert "daemon_started" not in ended.stderr
    assert list(temporary.iterdir()) == []
