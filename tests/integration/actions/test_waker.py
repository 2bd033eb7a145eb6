"""Actions are done when they are due, not at the next slot."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import BackgroundTasks, Crons
from catfeeder_cron.database import Database
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.errors import DatabaseUnavailable, SchemaProblem
from catfeeder_cron.scheduler.waker import Waker
from tests.integration.actions.conftest import HERE, Actions
from tests.integration.actions.test_check_actions import wait_until

LOOKS_BY_ITSELF_SECONDS = 60

CONFIG = """
[database]
url = "{url}"

[actions.note]
call = "handlers:note"

[jobs.check-actions]
interval = "1d"
catch_up = false
"""


@pytest.fixture
def crons(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Crons]]:
    """Starts a daemon's insides, whose next slot is far."""
    monkeypatch.syspath_prepend(str(HERE))
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(url=database_url))
    opened: list[tuple[Crons, BackgroundTasks]] = []

    def start() -> Crons:
        tasks = BackgroundTasks(max_workers=2)
        crons = Crons(config=config, background_tasks=tasks)
        opened.append((crons, tasks))
        assert crons.inject_crons() == 0
        tasks.start()
        return crons

    yield start
    for crons, tasks in opened:
        crons.request_stop()
        tasks.stop()
        crons.close()


def listeners(admin: psycopg.Connection) -> list[int]:
    statement = """SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                   AND (query LIKE 'LISTEN %' OR query LIKE 'UNLISTEN %')"""
    return [pid for (pid,) in admin.execute(statement)]


def test_an_insert_is_noticed_at_once(actions: Actions, crons: Callable[[], Crons]) -> None:
    crons()
    wait_until(lambda: listeners(actions.admin))
    time.sleep(0.5)  # it has looked, found nothing, and waits

    ids = list[str]()
    for _ in range(3):
        ids.append(str(actions.add("note")))
        in_time = LOOKS_BY_ITSELF_SECONDS / 2
        wait_until(lambda: [id for id, _, _ in actions.notes()] == ids, "the insert is noticed", in_time)
    statement = "SELECT DISTINCT trigger, slot FROM catfeeder_cron.job_runs WHERE job = 'check-actions'"
    assert actions.admin.execute(statement).fetchall() == [("schedule", None)]


def test_what_is_due_later_is_done_then(actions: Actions, crons: Callable[[], Crons]) -> None:
    actions.add("note", due="-1 s")
    crons()

    in_time = 'SELECT due_at <= started_at FROM "Actions", "ActionLog"'
    wait_until(lambda: actions.admin.execute(in_time).fetchone())
    assert actions.admin.execute(in_time).fetchone() == (True,)


def test_after_the_connection_is_lost_it_listens_again(actions: Actions, crons: Callable[[], Crons]) -> None:
    crons()
    wait_until(lambda: listeners(actions.admin))
    (lost,) = listeners(actions.admin)
    actions.admin.execute("SELECT pg_terminate_backend(%s)", [lost])
    wait_until(lambda: [pid for pid in listeners(actions.admin) if pid != lost])

    actions.add("note")

    wait_until(actions.notes)


def test_a_pause_holds_what_is_due(actions: Actions, crons: Callable[[], Crons]) -> None:
    actions.admin.execute("INSERT INTO catfeeder_cron.pauses (job, host) VALUES ('check-actions', 'here')")
    crons()
    wait_until(lambda: listeners(actions.admin))
    actions.add("note")
    time.sleep(1)  # whether it does nothing can't be waited for
    assert actions.notes() == []

    actions.admin.execute("DELETE FROM catfeeder_cron.pauses")

    wait_until(actions.notes)


@pytest.fixture
def waker(database: Database) -> Iterator[Callable[..., Waker]]:
    made: list[Waker] = []

    def make(due_in: Callable[[], float | None], run: Callable[[], None], database: Database = database) -> Waker:
        made.append(Waker("a-job", database, "a_channel", due_in, run, listen_again_seconds=0.2))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.close()


def test_what_stays_undone_is_tried_less_and_less_often(waker: Callable[..., Waker]) -> None:
    ran: list[tuple[float, float]] = []  # between which instants
    looked = [0.0]

    def due_in() -> float:
        looked.append(time.monotonic())
        return 0.0

    waker(due_in, lambda: ran.append((looked[-1], time.monotonic())))

    wait_until(lambda: len(ran) == 3)

    assert ran[1][1] - ran[0][0] >= 0.5
    assert ran[2][1] - ran[1][0] >= 1


def test_a_fruitful_run_is_followed_by_the_next(waker: Callable[..., Waker]) -> None:
    ran: list[None] = []

    def run() -> None:
        ran.append(None)
        threading.Thread(target=lambda: waiting.run_ended(fruitful=True)).start()

    waiting: Any = waker(lambda: 0.0 if len(ran) < 8 else None, run)

    # Less and less often, it would take more than a minute.
    wait_until(lambda: len(ran) == 8, "eight runs", seconds=60)


def test_an_error_is_told_once(waker: Callable[..., Waker], caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> float:
        raise SchemaProblem("no such table")

    failing = waker(fail, lambda: None)
    wait_until(lambda: "no such table" in caplog.text)
    for _ in range(5):
        failing.run_ended(fruitful=True)
        time.sleep(0.05)

    assert caplog.text.count("no such table") == 1


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Gives the names of the waker's events."""
    caplog.set_level("INFO")
    return lambda: [
        record.getMessage().split()[0] for record in caplog.records if record.name == "catfeeder_cron.waker"
    ]


def test_without_a_connection_of_its_own_it_looks_by_itself_and_says_so_once_and_when_that_is_over(
    waker: Callable[..., Waker],
    open_database: Callable[..., Database],
    role: Callable[..., tuple[str, str]],
    admin: psycopg.Connection,
    told: Callable[[], list[str]],
) -> None:
    name, url = role()
    database = open_database(url)
    looks: list[float] = []

    def look() -> float:
        database.query("SELECT 1", {})
        looks.append(time.monotonic())
        return 0.05

    database.query("SELECT 1", {})
    admin.execute(f"ALTER ROLE {name} CONNECTION LIMIT 1".encode())
    waker(look, lambda: None, database)

    wait_until(lambda: looks and looks[-1] - looks[0] > 1)  # it has tried to listen several times
    assert told() == ["notifications_do_not_arrive"]

    admin.execute(f"ALTER ROLE {name} CONNECTION LIMIT 2".encode())
    wait_until(lambda: told() == ["notifications_do_not_arrive", "notifications_arrive_again"])


def test_an_echo_that_was_late_once_is_not_held_against_it_for_ever(
    waker: Callable[..., Waker], admin: psycopg.Connection, told: Callable[[], list[str]]
) -> None:
    admin.execute("CREATE SCHEMA fake; CREATE FUNCTION fake.pg_notify(text, text) RETURNS void LANGUAGE sql AS ''")
    database = admin.info.dbname
    admin.execute(f'ALTER DATABASE "{database}" SET search_path = fake, pg_catalog, public'.encode())
    waker(lambda: 0.05, lambda: None)
    wait_until(lambda: told() == ["notifications_do_not_arrive"])

    admin.execute("DROP FUNCTION fake.pg_notify")

    wait_until(lambda: told() == ["notifications_do_not_arrive", "notifications_arrive_again"])


def test_a_limit_for_idle_sessions_is_nothing_to_speak_of(
    waker: Callable[..., Waker],
    open_database: Callable[..., Database],
    role: Callable[..., tuple[str, str]],
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, url = role()
    admin.execute(f"ALTER ROLE {name} SET idle_session_timeout = '300ms'".encode())
    database = open_database(url)
    looks: list[None] = []
    caplog.set_level("INFO", "catfeeder_cron")

    def look() -> None:
        looks.append(None)
        database.query("SELECT 1", {})

    waker(look, lambda: None, database)

    wait_until(lambda: len(looks) > 4, "the sessions after the first")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("catfeeder_cron")] == []


def test_an_outage_is_no_reason_to_do_without_notifications_after_it(
    waker: Callable[..., Waker],
    open_database: Callable[..., Database],
    mortal_server: EmbeddedServer,
    stop_server: Callable[[str], Callable[[], None]],
    told: Callable[[], list[str]],
) -> None:
    database = open_database(mortal_server.conninfo)
    looks: list[str] = []

    def look() -> float:
        try:
            database.query("SELECT 1", {})
        except DatabaseUnavailable:
            looks.append("in vain")
            raise
        looks.append("seen")
        return 0.05

    watching = waker(look, lambda: None, database)
    wait_until(lambda: "seen" in looks)
    start = stop_server("fast")
    wait_until(lambda: "in vain" in looks)
    start()
    looks.clear()

    def listens() -> bool:
        watching.run_ended(fruitful=True)  # it need not wait for its next try
        with psycopg.connect(mortal_server.conninfo) as admin:
            statement = "SELECT FROM pg_stat_activity WHERE query LIKE 'LISTEN %'"
            return bool(admin.execute(statement).fetchall())

    wait_until(listens)
    wait_until(lambda: "seen" in looks)
    assert told() == []
