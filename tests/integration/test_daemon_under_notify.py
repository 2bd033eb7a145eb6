"""The daemon as the service manager hears it: a real process, and a socket in systemd's place."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from pydantic import SecretStr

from catfeeder_cron.config import DatabaseSettings, DatabaseTables
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables
from tests.support.program import Program, Running
from tests.support.waiting import SOON, eventually


class Manager:
    """What systemd would have heard so far."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "notify"
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.address))

    def close(self) -> None:
        self._socket.close()

    def wait_for(self, beginning: str, *, anew: bool = False) -> str:
        """Return an assignment that begins so; with `anew` the next one."""
        for assignment in () if anew else self.heard:
            if assignment.startswith(beginning):
                return assignment
        until = time.monotonic() + SOON
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            for assignment in self._receive():
                if assignment.startswith(beginning):
                    return assignment
        pytest.fail(f"never heard {beginning}, but {self.heard}")

    def _receive(self) -> list[str]:
        try:
            assignments = self._socket.recv(65536).decode().split("\n")
        except TimeoutError:
            return []
        self.heard += assignments
        return assignments


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.close()


Start = Callable[..., Running]


@pytest.fixture
def start(manager: Manager, program: Program) -> Start:
    """Starts a daemon under the manager, with further environment variables."""

    def start(url: str, jobs: str = "", **variables: str) -> Running:
        program.configure(url, f"connect_timeout = 1\n{jobs}")
        return program.start("start", variables={"NOTIFY_SOCKET": str(manager.address), **variables})

    return start


def wait_until(connection: "psycopg.Connection", query: LiteralString, answer: object) -> None:
    eventually(lambda: connection.execute(query).fetchone() == (answer,), query)


def test_it_is_ready_without_a_database_says_so_and_says_when_that_is_over(
    manager: Manager, start: Start, database_url: str
) -> None:
    away = "postgresql://cat:hunter2@127.0.0.1:9/x"
    daemon = start(away)
    manager.wait_for("READY=1")
    status = manager.wait_for("STATUS=DATABASE UNREACHABLE: ")
    assert "hunter2" not in status
    assert "next " in status
    daemon.signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    assert daemon.finish().status == 0

    manager.heard.clear()
    start(database_url)
    manager.wait_for("READY=1")
    assert manager.wait_for("STATUS=idle; next ").endswith("(4 scheduled)")


def test_the_watchdog_is_fed_while_the_loop_turns_though_no_job_is_due_and_not_when_the_process_stands_still(
    manager: Manager, start: Start, database_url: str
) -> None:
    daemon = start(database_url, WATCHDOG_USEC="1500000")
    manager.wait_for("READY=1")
    for _ in range(4):
        manager.wait_for("WATCHDOG=1", anew=True)
    assert daemon.stop().status == 0


def test_a_stop_asks_for_time_while_a_job_ends_its_batch_and_says_what_it_waits_for(
    manager: Manager, start: Start, database_url: str
) -> None:
    settings = DatabaseSettings(url=SecretStr(database_url))
    with Database(settings) as database:
        list(schema.upgrade(database))
        list(create_tables(database, DatabaseTables()))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS"
            # No job waits for a lock for long.
            " $$BEGIN WHILE NOT pg_try_advisory_xact_lock(1) LOOP PERFORM pg_sleep(0.05); END LOOP; RETURN NULL; END$$"
        )
        connection.execute(
            'CREATE TRIGGER slowly AFTER DELETE ON "Connections" FOR EACH STATEMENT EXECUTE FUNCTION slowly()'
        )
        connection.execute("INSERT INTO \"Users\" (username) VALUES ('cat')")
        connection.execute(
            'INSERT INTO "Connections" (token, user_id, expiration_date)'
            " SELECT n::text, 1, now() - interval '1 day' FROM generate_series(1, 10) n"
        )
        connection.execute("SELECT pg_advisory_lock(1)")
        jobs = '[jobs.clean-tokens]\ninterval = "1s"\n'
        asleep: LiteralString = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        )
        daemon = start(database_url, jobs)
        manager.wait_for("STATUS=running clean-tokens")
        wait_until(connection, asleep, 1)
        daemon.signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        for _ in range(2):
            assert manager.wait_for("EXTEND_TIMEOUT_USEC=", anew=True) == "EXTEND_TIMEOUT_USEC=10000000"
        connection.execute("SELECT pg_advisory_unlock(1)")
        assert daemon.finish().status == 0
        assert "STATUS=stopping; waiting for clean-tokens" in manager.heard
        (outcome, counts), *_ = connection.execute(
            "SELECT outcome, counts FROM catfeeder_cron.job_runs WHERE job = 'clean-tokens' ORDER BY run_id"
        ).fetchall()
        assert (outcome, counts["deleted"]) in [("succeeded", 10), ("aborted", 10)]


def test_a_reload_is_over_though_a_callable_hangs_while_it_is_imported(
    manager: Manager, start: Start, program: Program, tmp_path: Path, database_url: str
) -> None:
    (tmp_path / "hangs.py").write_text("import threading\nthreading.Event().wait()\n")
    daemon = start(database_url, PYTHONPATH=str(tmp_path))
    manager.wait_for("READY=1")
    program.configure(database_url, '[jobs.report]\ncall = "hangs:main"\ninterval = "1d"\n')
    daemon.signal(signal.SIGHUP)
    manager.wait_for("RELOADING=1")
    manager.wait_for("READY=1", anew=True)
    assert manager.heard[-1].endswith("(5 scheduled)")
    assert daemon.stop().status == 0
