"""The two classes in programs of one's own: the ways in which they are used."""

import sys

import psycopg
import pytest

from tests.acceptance.program import ADD_CONNECTIONS, Program, count

EXPIRED = '"Connections" WHERE expiration_date < now()'


def run(program: Program, source: str) -> str:
    (program.folder / "program.py").write_text(source)
    ended = program.run_command(sys.executable, "-W", "error", "program.py")
    assert ended.status == 0, ended.stderr
    return ended.stdout


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
        return not connection.execute('SELECT count(*) FROM {EXPIRED}').fetchone()[0]
"""
    assert run(program, look + injected) == "0\n"
    assert count(admin, EXPIRED) == 0
    assert count(admin, "catfeeder_cron.job_runs WHERE trigger = 'schedule' AND outcome = 'succeeded'") >= 1

    admin.execute('DROP TABLE "Connections"')
    assert run(program, by_hand) == "84 0\n"


def test_without_a_configuration_crons_return_84_and_log_the_reason(program: Program) -> None:
    (program.folder / "program.py").write_text(
        "from catfeeder_cron import Crons\nprint(Crons().clean_expired_tokens())\n"
    )
    ended = program.run_command(sys.executable, "program.py")
    assert ended.stdout == "84\n"
    assert "no configuration" in ended.stderr
