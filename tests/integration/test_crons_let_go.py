"""A Crons that is dropped, closed or in use by two threads at once: what is left of it is nothing."""

import gc
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import BackgroundTasks, Crons
from catfeeder_cron.config import JobSettings
from catfeeder_cron.job import Job, JobContext
from tests.integration.daemons import Work, rows, tasks_of
from tests.support.waiting import SOON, eventually

# "Actions" is there, so that check-actions listens on a connection of its own.
TABLES = """
    CREATE TABLE "Connections" (id int, expiration_date timestamptz);
    CREATE TABLE "Actions" (
        id bigint, kind text, due_at timestamptz, state text, attempts int, lease_until timestamptz);
    CREATE TABLE "Pet" (
        id bigint, food_eaten int, food_reset timestamptz, time_reset_hours int, time_reset_minutes int);
    INSERT INTO "Pet" VALUES (1, 90, now() - interval '1 h', 24, 0)"""

CONFIG = """
[database]
url = "{url}"
[jobs.clean-verification]
enabled = false
[jobs.renew-oauth]
enabled = false
"""

JOB_METHODS = (
    Crons.check_actions,
    Crons.clean_expired_tokens,
    Crons.clean_expired_verification_nodes,
    Crons.renew_oaths,
    Crons.reset_food_counters,
    Crons._test_hello_world,
    Crons._test_current_date,
)


@pytest.fixture
def config(database_url: str, admin: psycopg.Connection, tmp_path: Path) -> Path:
    admin.execute(TABLES)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(url=database_url))
    path.chmod(0o600)
    return path


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    path = tmp_path / "nowhere.toml"
    path.write_text(CONFIG.format(url="postgresql://localhost:1/nowhere"))
    path.chmod(0o600)
    return path


@pytest.fixture
def threads() -> Iterator[Callable[[], set[threading.Thread]]]:
    """Gives the threads that have come up since the test began; in the end there must be none."""
    before = set(threading.enumerate())

    def new() -> set[threading.Thread]:
        # The one that imports for all the others lasts as long as the process.
        return {thread for thread in set(threading.enumerate()) - before if thread.name != "imports"}

    yield new
    eventually(lambda: not new())


def sessions(admin: psycopg.Connection) -> int:
    row = admin.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'catfeeder-cron' AND datname = current_database() AND pid <> pg_backend_pid()"
    ).fetchone()
    assert row is not None
    return int(row[0])


def running_here(admin: psycopg.Connection) -> list[Any]:
    if admin.execute("SELECT to_regclass('catfeeder_cron.daemons')").fetchone() == (None,):
        return []
    return admin.execute("SELECT * FROM catfeeder_cron.daemons").fetchall()


def by_hand(crons: Crons) -> None:
    assert crons.clean_expired_tokens() == 0


def dry(crons: Crons) -> None:
    assert crons.run("clean-tokens", dry_run=True).outcome == "succeeded"


def on_schedule(crons: Crons) -> None:
    assert crons.inject_crons() == 0


@pytest.mark.parametrize("use", [by_hand, dry, on_schedule])
def test_a_dropped_crons_lets_go_of_threads_connections_and_its_place_among_the_daemons(
    config: Path,
    admin: psycopg.Connection,
    threads: Callable[[], set[threading.Thread]],
    use: Callable[[Crons], None],
) -> None:
    crons = Crons(config=config)
    use(crons)
    eventually(lambda: sessions(admin) and threads())
    gone = weakref.ref(crons)

    del crons

    assert gone() is None, "nothing refers to it, not even in a circle"
    eventually(lambda: not threads() and sessions(admin) == 0)
    if use is not dry:
        assert running_here(admin) == []


def test_a_background_tasks_that_was_handed_in_loses_the_tasks_of_a_dropped_crons_alone(
    config: Path, admin: psycopg.Connection, threads: Callable[[], set[threading.Thread]]
) -> None:
    with BackgroundTasks() as tasks:
        mine = tasks.add_task(print, hours=1)
        first = Crons(config=config, background_tasks=tasks)
        assert first.inject_crons() == 0
        tasks.start()
        eventually(lambda: sessions(admin))
        second = Crons(config=config, background_tasks=tasks)
        assert second.inject_crons() == 0
        ids = {task.id for task in tasks.tasks}
        eventually(lambda: len(running_here(admin)) == 2)

        del first

        eventually(lambda: len(running_here(admin)) == 1)
        assert {"clean-tokens", "check-actions", mine.id} <= ids
        assert {"clean-tokens", "check-actions", mine.id} <= {task.id for task in tasks.tasks}, "the second's"
        del second
        eventually(lambda: [task.id for task in tasks.tasks] == [mine.id])
        eventually(lambda: sessions(admin) == 0)
        assert tasks.running


def open_with(work: Work, url: str, folder: Path, **keywords: Any) -> Crons:
    path = folder / "work.toml"
    path.write_text(f'[database]\nurl = "{url}"\n[jobs.{work.job.id}]\ninterval = 1\n')
    path.chmod(0o600)
    return Crons(config=path, jobs={work.job.id: work.job}, **keywords)


@pytest.mark.parametrize("handed_in", [False, True])
def test_running_jobs_of_a_dropped_crons_are_asked_to_end_and_recorded(
    database_url: str,
    admin: psycopg.Connection,
    tmp_path: Path,
    threads: Callable[[], set[threading.Thread]],
    handed_in: bool,
) -> None:
    work = Work(released=False)
    with BackgroundTasks() as tasks:
        crons = open_with(work, database_url, tmp_path, **({"background_tasks": tasks} if handed_in else {}))
        assert crons.inject_crons() == 0
        tasks.start()
        eventually(lambda: work.runs)
        del crons
        eventually(lambda: rows(admin, "*", "outcome = 'aborted'"))
        eventually(lambda: sessions(admin) == 0)
        assert tasks.tasks == []
    found = rows(admin, "outcome, reason", "missed IS NULL")
    assert found == [("aborted", "the Crons object that ran it was dropped")]
    assert running_here(admin) == []


def test_a_crons_that_is_dropped_by_one_of_its_own_tasks_lets_go_too(
    config: Path, admin: psycopg.Connection, threads: Callable[[], set[threading.Thread]]
) -> None:
    crons = [Crons(config=config)]
    assert crons[0].inject_crons() == 0
    crons[0].background_tasks.add_task(crons.clear, trigger="date")
    eventually(lambda: not crons)
    gc.collect()
    eventually(lambda: not threads() and sessions(admin) == 0)


def test_opening_waits_for_those_that_were_dropped_before(
    config: Path, admin: psycopg.Connection, threads: Callable[[], set[threading.Thread]]
) -> None:
    """So that a loop of calls needs no more than a few threads and connections, however slow the machine is."""
    most_sessions = most_threads = 0
    for _ in range(20):
        assert Crons(config=config).clean_expired_tokens() == 0
        most_sessions = max(most_sessions, sessions(admin))
        most_threads = max(most_threads, len(threads()))
    # One that is in use, one that is letting go; each has up to three threads and the one that lets go.
    assert most_sessions <= 4
    assert most_threads <= 8


@pytest.mark.parametrize("used", [False, True])
def test_a_closed_crons_says_so_and_starts_nothing(
    config: Path,
    threads: Callable[[], set[threading.Thread]],
    caplog: pytest.LogCaptureFixture,
    used: bool,
) -> None:
    with Crons(config=config, error=7) as crons:
        if used:
            assert crons.inject_crons() == 0
            assert crons.clean_expired_tokens() == 0
    eventually(lambda: not threads())

    for method in (Crons.inject_crons, *JOB_METHODS):
        caplog.clear()
        assert method(crons) == 7
        assert "this Crons object is closed; make a new one" in caplog.text
    assert threads() == set()
    crons.close()


def test_what_is_handed_in_gets_nothing_from_a_closed_crons(
    config: Path, admin: psycopg.Connection, threads: Callable[[], set[threading.Thread]]
) -> None:
    with BackgroundTasks() as tasks:
        with Crons(config=config, background_tasks=tasks) as crons:
            assert crons.inject_crons() == 0
        assert crons.inject_crons() == 84
        crons._open().job_scheduler.beat(True)  # a heartbeat that was at work at that moment
        assert tasks.tasks == []


def test_nothing_is_left_of_a_crons_that_is_closed_while_it_is_put_on_a_schedule(
    nowhere: Path, threads: Callable[[], set[threading.Thread]]
) -> None:
    codes = set()
    for delay in range(40):
        crons = Crons(config=nowhere)
        begin = threading.Barrier(2)

        def inject(crons: Crons = crons, begin: threading.Barrier = begin) -> None:
            begin.wait(SOON)
            codes.add(crons.inject_crons())

        injecting = threading.Thread(target=inject)
        injecting.start()
        begin.wait(SOON)
        threading.Event().wait(delay / 4000)
        crons.close()
        injecting.join(SOON)
        if crons._runtime:
            assert not tasks_of(crons).running
            assert tasks_of(crons).tasks == []
    assert codes <= {0, 84}
    eventually(lambda: not threads())


def test_a_handler_of_a_signal_may_close_it_in_the_midst_of_a_start(
    nowhere: Path, threads: Callable[[], set[threading.Thread]]
) -> None:
    """It runs in the thread that starts, so it must not wait for that."""
    # What is logged of this job comes up in the midst of a start.
    nowhere.write_text(nowhere.read_text() + "[jobs.test-hello-world]\nenabled = true\ndate = 2020-01-01T00:00:00Z\n")
    crons = Crons(config=nowhere)

    class Interrupter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "job_has_no_slot_ahead" in record.getMessage():
                signal.raise_signal(signal.SIGUSR1)

    interrupter, logger = Interrupter(), logging.getLogger("catfeeder_cron.scheduler")
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: crons.close())
    level = logger.level
    try:
        logger.addHandler(interrupter)
        logger.setLevel(logging.INFO)
        assert crons.inject_crons() == 84
    finally:
        logger.removeHandler(interrupter)
        logger.setLevel(level)
        signal.signal(signal.SIGUSR1, before)
    assert not crons.background_tasks.running
    assert crons.background_tasks.tasks == []


def test_a_job_that_is_run_by_hand_while_it_is_closed_ends_or_is_refused(
    database_url: str, admin: psycopg.Connection, tmp_path: Path, threads: Callable[[], set[threading.Thread]]
) -> None:
    work = Work(released=False)
    crons = open_with(work, database_url, tmp_path)
    codes: list[int] = []
    by_hand = threading.Thread(target=lambda: codes.append(crons._run_now("work")))
    by_hand.start()
    eventually(lambda: work.runs)
    crons.close()
    by_hand.join(SOON)
    assert codes == [84]
    assert rows(admin, "outcome, reason") == [("aborted", "the process was asked to stop")]


def test_the_codes_debug_and_the_background_tasks_can_be_read(
    config: Path, caplog: pytest.LogCaptureFixture, threads: Callable[[], set[threading.Thread]]
) -> None:
    caplog.set_level("NOTSET", logger="catfeeder_cron")
    with Crons(error=20, success=10, debug=True, config=config) as crons:
        assert (crons.success, crons.error, crons.debug) == (10, 20, True)
        assert crons.inject_crons() == 10
        assert crons.background_tasks.running
        assert crons.background_tasks.debug
        assert crons.background_tasks.safe_pause() == 0
    assert {"jobs_scheduled", "scheduler_started", "scheduler_paused", "scheduler_stopped"} <= {
        record.getMessage().split()[0] for record in caplog.records
    }
    assert (Crons().success, Crons().error, Crons().debug) == (0, 84, False)
    tasks = BackgroundTasks()
    assert Crons(background_tasks=tasks).background_tasks is tasks, "without a configuration, too"


def test_food_counters_are_reset_by_hand(config: Path, admin: psycopg.Connection) -> None:
    with Crons(config=config) as crons:
        assert crons.reset_food_counters() == 0
    assert admin.execute('SELECT food_eaten, food_reset > now() FROM "Pet"').fetchall() == [(0, True)]


def test_what_runs_in_a_process_of_its_own_ends_with_a_dropped_crons(
    database_url: str, admin: psycopg.Connection, tmp_path: Path, threads: Callable[[], set[threading.Thread]]
) -> None:
    begun = threading.Event()

    def run(context: JobContext, _settings: JobSettings) -> None:
        call = context.resources.children.call("sleep", "time:sleep", 300, on_line=print)
        begun.set()
        with context.stop.calling(call.kill):
            call.future.exception()
        context.checkpoint()

    work = Work()
    work.job = Job(id="work", summary="work", settings=JobSettings, run=run)
    crons = open_with(work, database_url, tmp_path)
    assert crons.inject_crons() == 0
    assert begun.wait(SOON)
    del crons
    eventually(lambda: rows(admin, "*", "outcome = 'aborted'"))
    eventually(lambda: not threads())
