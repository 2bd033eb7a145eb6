"""The two classes in programs of one's own: the ways in which they are used."""

import subprocess
import sys

import psycopg
import pytest

from tests.support.program import ADD_CONNECTIONS, SLOW_DOWN_DELETIONS, Finished, Program, count
from tests.support.waiting import eventually

EXPIRED = '"Connections" WHERE expiration_date < now()'


# Python warns of forks where there are threads, which is what some of these programs are about.
STRICTLY = ("-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning")


def run(program: Program, source: str) -> str:
    """Return what a program prints that runs with every warning on."""
    return run_to_its_end(program, source).stdout


def run_to_its_end(program: Program, source: str) -> Finished:
    (program.folder / "program.py").write_text(source)
    ended = program.run_command(sys.executable, *STRICTLY, "program.py", seconds=300)
    assert ended.status == 0, ended.stderr
    assert_nothing_went_wrong(ended.stderr)
    return ended


def assert_nothing_went_wrong(stderr: str) -> None:
    """What is logged for people, such as that a job still runs when it is due again, is none of that."""
    for complaint in ("Warning", "Exception ignored", "Traceback"):
        assert complaint not in stderr, stderr


def test_an_interval_task_runs_on_a_thread_until_the_program_ends(program: Program) -> None:
    source = """
import threading
from catfeeder_cron import BackgroundTasks

called = threading.Semaphore(0)
tasks = BackgroundTasks()
tasks.add_task(called.release, trigger="interval", seconds=0.2)
tasks.start()
assert called.acquire(timeout=60) and called.acquire(timeout=60)
print("twice in", threading.main_thread().name)
tasks.stop()
"""
    assert run(program, source) == "twice in MainThread\n"
    # Dropped without `stop` it does not keep the program from ending.
    assert run(program, source.replace("tasks.stop()", "")) == "twice in MainThread\n"


def test_a_task_with_arguments_every_300_seconds(program: Program) -> None:
    source = """
from datetime import datetime, timedelta, timezone
from catfeeder_cron import BackgroundTasks

def report(number, message):
    print(number, message)

with BackgroundTasks() as tasks:
    job = tasks.safe_add_task(report, args=(123,), kwargs={"message": "Hello!"}, trigger="interval", seconds=300)
    assert tasks.safe_start() == 0 and tasks.safe_start() == 0
    wait = job.next_run_time - datetime.now(timezone.utc)
    assert timedelta(seconds=290) < wait <= timedelta(seconds=300), wait
    job.func(*job.args, **job.kwargs)
    assert tasks.safe_add_task("not callable") == 84
    try:
        tasks.add_task("not callable")
    except ValueError:
        print("refused")
    assert tasks.safe_stop() == 0 and tasks.safe_stop() == 0
"""
    assert run(program, source) == "123 Hello!\nrefused\n"


def test_the_documented_way_to_find_out_what_became_of_a_task_works(program: Program) -> None:
    """Both ways out, since the second operand of the comparison is only looked at when something is wrong."""
    source = """
from catfeeder_cron import BackgroundTasks

background = BackgroundTasks()
for func in (print, "no callable"):
    result = background.safe_add_task(func=func)
    if isinstance(result, int) and result == background.error:
        print("Failed to add task")
    else:
        print(f"Task added successfully: {result}")
"""
    added, failed = run(program, source).splitlines()
    assert added.startswith("Task added successfully: print (trigger: interval[0:00:05]")
    assert failed == "Failed to add task"


RUN_AT_A_SLOT = "catfeeder_cron.job_runs WHERE trigger = 'schedule' AND outcome = 'succeeded'"


@pytest.mark.usefixtures("app_tables")
def test_crons_are_injected_into_a_schedule_or_run_by_hand(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, '[jobs.clean-tokens]\ninterval = "1s"\n')
    admin.execute(ADD_CONNECTIONS, {"expired": 30, "live": 5})
    by_hand = """
from catfeeder_cron import Crons

print(Crons(error=84, success=0).clean_expired_tokens(), Crons().clean_expired_verification_nodes())
"""
    assert run(program, by_hand) == "0 0\n"
    assert (count(admin, EXPIRED), count(admin, '"Connections"')) == (0, 5)

    admin.execute(ADD_CONNECTIONS, {"expired": 40, "live": 0})
    injected = """
import time
from catfeeder_cron import Crons

with Crons() as crons:
    print(crons.inject_crons())
    deadline = time.monotonic() + 60
    while not crons_have_run() and time.monotonic() < deadline:
        time.sleep(0.05)
"""
    look = f"""
import psycopg

def crons_have_run():
    with psycopg.connect({database_url!r}) as connection:
        return connection.execute("SELECT count(*) FROM {RUN_AT_A_SLOT}").fetchone()[0]
"""
    assert run(program, look + injected) == "0\n"
    assert count(admin, EXPIRED) == 0
    assert count(admin, RUN_AT_A_SLOT) >= 1

    admin.execute('DROP TABLE "Connections"')
    failed = run_to_its_end(program, by_hand)
    assert failed.stdout == "84 0\n"
    assert 'there is no table "public"."Connections"' in failed.stderr


@pytest.mark.usefixtures("app_tables")
def test_a_loop_of_dropped_crons_needs_no_more_than_a_few_connections_and_threads(
    program: Program, admin: psycopg.Connection
) -> None:
    source = """
import threading
from catfeeder_cron import Crons

codes = [Crons().clean_expired_tokens()]
first, most = threading.active_count(), 0
for _ in range(99):
    codes.append(Crons().clean_expired_tokens())
    most = max(most, threading.active_count())
assert most <= first + 8, (first, most)
print(len(codes), set(codes))
"""
    # A server has room for 100 connections; a Crons has two.
    assert run(program, source) == "100 {0}\n"
    assert count(admin, "catfeeder_cron.daemons") == 0


DROPPED_LAST = """
import atexit, time
from catfeeder_cron import Crons

held = [Crons()]
print(held[0].clean_expired_tokens())

@atexit.register
def drop():
    held.clear()
    time.sleep(0.5)  # by then another thread has begun to let it go
"""


@pytest.mark.usefixtures("app_tables")
def test_a_program_that_ends_right_after_a_drop_waits_until_all_is_let_go(
    program: Program, admin: psycopg.Connection
) -> None:
    body = "BEGIN PERFORM pg_sleep(2); RETURN OLD; END"
    admin.execute(f"CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS '{body}'".encode())
    admin.execute("CREATE TRIGGER slow BEFORE DELETE ON catfeeder_cron.daemons FOR EACH ROW EXECUTE FUNCTION wait()")
    assert run(program, DROPPED_LAST) == "0\n"
    assert count(admin, "catfeeder_cron.daemons") == 0


LEFT_OPEN = """
import logging, time
import psycopg
from catfeeder_cron import Crons

logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a busy machine passes runs over, and APScheduler tells
crons = Crons()
print(crons.inject_crons(), flush=True)
with psycopg.connect({url!r}, autocommit=True) as connection:
    while connection.execute('SELECT count(*) FROM "Connections"').fetchone()[0] == 3000:
        time.sleep(0.05)
"""


@pytest.mark.usefixtures("app_tables")
def test_a_program_that_ends_while_a_job_runs_asks_it_to_end_and_records_it(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    others = "[jobs.test-hello-world]\nenabled = true\ninterval = 1\n"
    program.configure(database_url, f'[jobs.clean-tokens]\ninterval = "1s"\nbatch_size = 1\n{others}')
    admin.execute(ADD_CONNECTIONS, {"expired": 3000, "live": 0})
    admin.execute(SLOW_DOWN_DELETIONS)
    ended = run_to_its_end(program, LEFT_OPEN.format(url=database_url))
    assert ended.stdout == "0\n"
    assert "shutdown" not in ended.stderr
    found = admin.execute(
        "SELECT outcome, reason, (counts->>'deleted')::int > 0 FROM catfeeder_cron.job_runs WHERE job = 'clean-tokens'"
    )
    assert ("aborted", "the program is ending", True) in found.fetchall()
    assert count(admin, "catfeeder_cron.daemons") == 0
    assert count(admin, "catfeeder_cron.job_runs WHERE outcome IS NULL") == 0
    assert count(admin, EXPIRED) > 0


FORKS = """
import os, sys, time
from catfeeder_cron import BackgroundTasks, Crons
from catfeeder_cron.config import load
from catfeeder_cron.database import Database
from catfeeder_cron.jobs import built_in, load_settings

settings = load_settings()
database = Database(settings.database)
used, handed, fresh = Crons(), Crons(config=settings, database=database), Crons()
assert used.inject_crons() == 0 and used.clean_expired_tokens() == 0 and handed.clean_expired_tokens() == 0
assert fresh.settings == settings

def backend(database):
    return database.query("SELECT pg_backend_pid()", {})

def backends():
    return [backend(each) for each in (database, used._open().database)]

before = backends()
child = os.fork()
if child == 0:
    print(used.inject_crons(), used.clean_expired_tokens(), handed.clean_expired_tokens(), used.running)
    used.close()
    with handed:
        pass
    del used
    # What was not in use before the fork may be used after it.
    print(fresh.clean_expired_tokens(), backend(database) in before, flush=True)
    database.close()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print(backends() == before, used.clean_expired_tokens(), used.background_tasks.running, flush=True)
for each in (used, handed, database):
    each.close()
"""


@pytest.mark.usefixtures("app_tables")
def test_after_a_fork_the_child_is_told_that_what_is_in_use_is_the_parents_and_does_it_no_harm(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    # So that every statement of a pool is sent over the same connection.
    program.configure(database_url, "pool_max_size = 1\n")
    ended = run_to_its_end(program, FORKS)
    assert ended.stdout.splitlines() == ["84 84 84 []", "0 False", "True 0 True"]
    assert ended.stderr.count("it was in use before this process was forked") == 3
    assert "make a new one after the fork" in ended.stderr
    assert count(admin, "catfeeder_cron.daemons") == 0


PRELOADED = """
import logging, os, sys, time
from datetime import timedelta
from catfeeder_cron import BackgroundTasks, Crons

logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a busy machine passes runs over, and APScheduler tells
tasks = BackgroundTasks()
crons = Crons(background_tasks=tasks)
own = Crons()
assert crons.settings and own.background_tasks and not tasks.running

def work():
    assert crons.inject_crons() == 0 and tasks.safe_start() == 0 and own.inject_crons() == 0
    assert own.run("clean-tokens", wait=timedelta(seconds=100)).outcome == "succeeded"
    sys.stdin.read()
    for each in (crons, own):
        each.close()
    assert tasks.safe_stop() == 0

children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        work()
        sys.exit()
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children], flush=True)
"""


@pytest.mark.usefixtures("app_tables")
def test_what_is_made_before_a_fork_can_be_started_in_every_child_as_by_gunicorns_preload(
    program: Program, admin: psycopg.Connection
) -> None:
    (program.folder / "program.py").write_text(PRELOADED)
    command = [sys.executable, *STRICTLY, "program.py"]
    with subprocess.Popen(
        command,
        cwd=program.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            # Two objects in each of two processes, each another one to the ledger.
            eventually(lambda: known_daemons(admin) == (4, 2), "four daemons in two processes", seconds=120)
        finally:
            said, complaints = process.communicate("", timeout=120)
    assert said == "[0, 0]\n"
    assert_nothing_went_wrong(complaints)
    assert count(admin, "catfeeder_cron.daemons") == 0


def known_daemons(admin: psycopg.Connection) -> tuple[int, int]:
    """Return how many daemons there are, and in how many processes."""
    if admin.execute("SELECT to_regclass('catfeeder_cron.daemons')").fetchone() == (None,):
        return (0, 0)
    row = admin.execute("SELECT count(DISTINCT daemon), count(DISTINCT pid) FROM catfeeder_cron.daemons").fetchone()
    assert row is not None
    return row[0], row[1]


def test_without_a_configuration_crons_return_84_and_log_the_reason(program: Program) -> None:
    (program.folder / "program.py").write_text(
        "from catfeeder_cron import Crons\nprint(Crons().clean_expired_tokens())\n"
    )
    ended = program.run_command(sys.executable, "program.py")
    assert ended.stdout == "84\n"
    assert "no configuration" in ended.stderr
