"""Jobs that only exist in config.toml: what a statement of SQL or a Python callable does, and how its run ends.

A callable runs in a process of its own, so what it did is read from a file that it writes.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import Crons
from catfeeder_cron.config import load
from catfeeder_cron.errors import JobAborted
from catfeeder_cron.job import JobContext
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.executor import run_job
from catfeeder_cron.times import elapsed_seconds
from tests.support.processes import is_alive
from tests.support.waiting import eventually

CALLABLES = Path(__file__).parents[1] / "support" / "custom_callables.py"

Run = Callable[..., JobReport]


@pytest.fixture
def callables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """The module `feeders` lies where processes find it; gives what its functions have noted so far."""
    (tmp_path / "feeders.py").write_text(CALLABLES.read_text())
    (tmp_path / "script.py").write_text("import sys\nprint('at import')\nsys.exit(3)\n")
    (tmp_path / "broken.py").write_text("def main(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = tmp_path / "seen"
    return lambda: [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []


@pytest.fixture
def crons_for(with_schema: None, database_url: str, tmp_path: Path) -> Iterator[Callable[[str], Crons]]:
    """Gives the jobs of a configuration whose only custom job, `report`, has these lines."""
    opened: list[Crons] = []

    def crons(lines: str) -> Crons:
        path = tmp_path / "config.toml"
        path.write_text(f'[database]\nurl = "{database_url}"\n\n[jobs.report]\ninterval = "1h"\n{lines}\n')
        opened.append(Crons(config=path))
        return opened[-1]

    yield crons
    for each in opened:
        each.close()


@pytest.fixture
def run(crons_for: Callable[[str], Crons], callables: Any) -> Run:
    """Runs the job `report` with these lines of configuration, once."""
    return lambda lines, **options: crons_for(lines).run("report", **options)


@pytest.fixture
def context(crons_for: Callable[[str], Crons], callables: Any) -> Callable[[str], tuple[JobContext, Callable[[], Any]]]:
    """Gives a context that the test can stop, and what starts the job in a thread and gives its report's box."""

    def prepare(lines: str) -> tuple[JobContext, Callable[[], Any]]:
        crons = crons_for(lines)
        job, settings = crons.find("report")
        given = crons._open().executor.context("report")
        reports: list[JobReport] = []
        thread = threading.Thread(target=lambda: reports.append(run_job(job, given, settings)))

        def end() -> JobReport:
            thread.join(20)
            return reports[0]

        thread.start()
        return given, end

    return prepare


@pytest.fixture
def news(admin: psycopg.Connection) -> psycopg.Connection:
    admin.execute("CREATE TABLE news (id int PRIMARY KEY, title text)")
    admin.execute("INSERT INTO news SELECT n, 'title ' || n FROM generate_series(1, 10) n")
    return admin


def count(admin: psycopg.Connection) -> int:
    row = admin.execute("SELECT count(*) FROM news").fetchone()
    assert row is not None
    return int(row[0])


def test_a_statement_changes_rows_and_counts_them(run: Run, news: psycopg.Connection) -> None:
    report = run('sql = "DELETE FROM news WHERE id <= 3"')

    assert (report.outcome, report.counts) == ("succeeded", {"rows": 3})
    assert count(news) == 7


def test_a_dry_run_counts_truly_and_changes_nothing(run: Run, news: psycopg.Connection) -> None:
    report = run('sql = "DELETE FROM news WHERE id <= 3"', dry_run=True)

    assert (report.outcome, report.counts, report.dry_run) == ("succeeded", {"rows": 3}, True)
    assert count(news) == 10


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("DELETE FROM news WHERE title LIKE 'title 1%'", 2),
        ("DELETE FROM news WHERE title LIKE '%s' OR title LIKE '%(x)s'", 0),
        ("SELECT title FROM news", 10),
        ("CREATE TABLE other (id int)", 0),
        ("-- nothing", 0),
        ("DELETE FROM news;", 10),
    ],
)
def test_a_statement_is_sent_as_it_stands(run: Run, news: psycopg.Connection, sql: str, rows: int) -> None:
    assert run(f'sql = "{sql}"').counts == {"rows": rows}


def test_more_than_one_statement_is_refused_as_a_whole(run: Run, news: psycopg.Connection) -> None:
    report = run('sql = "DELETE FROM news; DELETE FROM news"')

    assert report.outcome == "failed"
    assert report.reason is not None
    assert "multiple commands" in report.reason
    assert count(news) == 10


def test_copy_to_the_client_is_refused_and_leaves_the_database_usable(run: Run, news: psycopg.Connection) -> None:
    report = run('sql = "COPY news TO STDOUT"')

    assert report.outcome == "failed"
    assert report.reason is not None
    assert "COPY" in report.reason
    assert "no connection" not in report.reason


def test_an_error_is_told_in_one_line_without_the_rows_that_it_quotes(run: Run, news: psycopg.Connection) -> None:
    report = run("sql = \"INSERT INTO news VALUES (1, 'secret')\"")

    assert report.outcome == "failed"
    assert report.counts == {}
    assert report.reason is not None
    assert "news_pkey" in report.reason
    assert "(id)=(1)" not in report.reason
    assert "\n" not in report.reason


def test_an_error_at_the_commit_leaves_no_count(run: Run, news: psycopg.Connection) -> None:
    news.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    news.execute("ALTER TABLE news ADD parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED")

    report = run('sql = "UPDATE news SET parent = 1"')

    assert (report.outcome, report.counts) == ("failed", {})


def test_the_jobs_timeout_holds_for_a_statement(run: Run) -> None:
    report = run('sql = "SELECT pg_sleep(3600)"\ntimeout = "0.3s"')

    assert report.outcome == "timed_out"


def test_the_databases_statement_timeout_does_not(database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    job = "[jobs.report]\ninterval = 3600\nsql = 'SELECT pg_sleep(0.3)'\n"
    path.write_text(f'[database]\nurl = "{database_url}"\nstatement_timeout = "0.1s"\n{job}')

    with Crons(config=path) as crons:
        assert crons.run("report", dry_run=True).outcome == "succeeded"


def test_a_callable_gets_its_arguments_and_can_not_change_them_for_the_next_run(
    crons_for: Callable[[str], Crons], callables: Any
) -> None:
    crons = crons_for('call = "feeders:note"\nargs = ["cats", 2]\nkwargs = { list = [1], deep = { a = true } }')

    assert crons.run("report").outcome == "succeeded"
    assert crons.run("report").outcome == "succeeded"

    assert callables() == [[["cats", 2], {"list": [1], "deep": {"a": True}}]] * 2


def test_arguments_are_all_that_toml_can_say(run: Run, callables: Any) -> None:
    times = "2026-01-02, 03:04:05, 2026-01-02T03:04:05Z"
    run(f'call = "feeders:kinds"\nargs = [1, 1.5, nan, true, "x", {times}, [1], {{a = 1}}]')

    assert callables() == [["int", "float", "float", "bool", "str", "date", "time", "datetime", "list", "dict"]]


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        ('call = "feeders:note_later"\nargs = ["later"]', ["later"]),
        ('call = "feeders:awaitable"', ["awaited"]),
        ('call = "feeders:Namespace.inner"', ["inner"]),
        ('call = "feeders:now"', []),
        ('call = "feeders:leave"\nargs = [0]', []),
        ('call = "feeders:use_a_pool"', [[1, 2]]),
        ('call = "feeders:fork_and_kill"', [int(signal.SIGTERM)]),
        ('call = "feeders:fork_and_come_back"', ["parent"]),
    ],
)
def test_what_can_be_called_or_awaited_is(run: Run, callables: Any, lines: str, seen: list[Any]) -> None:
    assert run(lines).outcome == "succeeded"
    assert callables() == seen


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('call = "feeders:fail"', "ValueError: see the log"),
        ('call = "feeders:fail_unheard_of"', "Unheard: see the log"),
        ('call = "feeders:interrupt"', "KeyboardInterrupt: see the log"),
        ('call = "feeders:run_out_of_memory"', "MemoryError: see the log"),
        ('call = "feeders:leave"\nargs = [3]', "it ended with exit status 3"),
        ('call = "feeders:leave"\nargs = ["sorry\\nme"]', "it ended with exit status sorry me"),
        ('call = "feeders:leave"\nargs = ["a \\u0000 byte"]', "it ended with exit status a byte"),
        ('call = "feeders:cancelled"', "it was cancelled, though nobody asked it to stop"),
        ('call = "feeders:generator"', "it is a generator function"),
        ('call = "feeders:async_generator"', "it is a generator function"),
        ('call = "feeders:note_later"', "TypeError: see the log"),
        ('call = "feeders:nobody"', '"feeders:nobody" can\'t be imported: AttributeError'),
        ('call = "feeders:number"', '"feeders:number" is int, expected something callable'),
        ('call = "nowhere:main"', "\"nowhere:main\" can't be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ('call = "script:main"', '"script:main" can\'t be imported: SystemExit: 3'),
        ('call = "broken:main"', '"broken:main" can\'t be imported: SyntaxError'),
        ('call = "feeders:quit_at_once"\nargs = [5]', "its process ended with exit status 5"),
        ('call = "feeders:kill_itself"\nargs = [11]', "its process was killed by SIGSEGV"),
        (
            'call = "feeders:kill_itself"\nargs = [9]',
            "its process was killed by SIGKILL, as the system does when memory",
        ),
        ('call = "feeders:close_everything"', "its process ended"),
    ],
)
def test_whatever_a_callable_ends_in_its_run_fails_with_a_reason_in_one_line(run: Run, lines: str, reason: str) -> None:
    report = run(lines)

    assert report.outcome == "failed"
    assert report.reason is not None
    assert report.reason.startswith(reason)
    assert "\n" not in report.reason


def test_the_traceback_of_what_it_raised_is_kept_in_one_entry(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run('call = "feeders:fail"')

    (entry,) = [entry for entry in events(caplog) if entry["event"] == "job_raised"]
    assert entry["job"] == "report"
    assert "in fail" in entry["exception"]
    assert "worker.py" not in entry["exception"]
    assert "ValueError: no" in entry["exception"]


def test_the_stacks_of_a_crash_are_in_the_log(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    run('call = "feeders:kill_itself"\nargs = [11]')

    printed = [entry["line"] for entry in events(caplog) if entry["event"] == "job_output"]
    assert any("in kill_itself" in line for line in printed)


@pytest.mark.parametrize(
    ("lines", "level"),
    [
        ('call = "feeders:note"', "INFO"),
        ("sql = \"UPDATE news SET title = 'x' WHERE id = 1\"", "INFO"),
        ('sql = "DELETE FROM news WHERE id < 0"', "DEBUG"),
    ],
)
def test_a_success_is_news_unless_there_was_nothing_to_do(
    run: Run, news: psycopg.Connection, caplog: pytest.LogCaptureFixture, lines: str, level: str
) -> None:
    caplog.set_level(logging.DEBUG, "catfeeder_cron")

    run(lines)

    assert [record.levelname for record in caplog.records if "job_finished" in record.getMessage()] == [level]


def test_a_dry_run_of_a_callable_says_that_it_can_not_tell(run: Run, callables: Any) -> None:
    report = run('call = "feeders:note"', dry_run=True)

    assert (report.outcome, report.reason) == ("skipped", "a Python callable can't tell what it would do")
    assert callables() == []


def test_a_dry_run_finds_out_that_there_is_no_such_callable(run: Run) -> None:
    assert run('call = "feeders:nobody"', dry_run=True).outcome == "failed"


def test_what_it_prints_and_logs_carries_its_name(
    run: Run, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    given: list[tuple[str, str]] = []

    def remember(record: logging.LogRecord) -> bool:
        given.append((record.name, job_of_context()))
        return True

    caplog.handler.addFilter(remember)

    run('call = "feeders:speak"')

    lines = {entry["line"]: entry["job"] for entry in events(caplog) if entry["event"] == "job_output"}
    assert lines == dict.fromkeys(("one", "two", "three", "five", "six"), "report")
    assert capfd.readouterr() == ("", "")
    logged = [record for record in caplog.records if record.name == "reports"]
    assert [(record.levelname, record.getMessage()) for record in logged] == [
        ("WARNING", "four"),
        ("ERROR", "failed, but went on"),
    ]
    assert "ValueError: seven" in (logged[1].exc_text or "")
    assert [job for name, job in given if name == "reports"] == ["report", "report"]


def test_a_record_below_the_level_of_this_program_stays_away(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    run('call = "feeders:speak"')

    assert [record.getMessage() for record in caplog.records if record.name == "reports"] == ["failed, but went on"]


def test_a_line_without_end_is_told_in_pieces(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    run('call = "feeders:mutter"')

    pieces = [vars(record)["event_dict"]["line"] for record in caplog.records if "job_output" in record.getMessage()]
    assert sum(map(len, pieces)) == 20_000
    assert max(map(len, pieces)) < 100_000


def test_a_callable_that_looks_is_stopped_by_its_timeout(run: Run) -> None:
    report = run('call = "feeders:until_stopped"\ntimeout = "0.2s"')

    assert (report.outcome, report.reason) == ("timed_out", "longer than its timeout of 0.2 s")


def test_a_coroutine_is_cancelled_at_its_timeout_and_may_clean_up(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:patient"')
    eventually(callables)
    given.time_out()

    assert end().outcome == "timed_out"
    assert callables() == ["begun", "cleaned up"]


def test_a_coroutine_that_resists_is_cancelled_again(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:stubborn"')
    eventually(callables)
    given.time_out()

    assert (end().outcome, end().reason) == ("timed_out", "longer than its timeout of 600 s")
    assert callables() == ["begun", "begun"]


@pytest.mark.parametrize("function", ["until_stopped", "until_a_thread_sees_the_stop", "patient"])
def test_one_that_is_asked_to_stop_and_looks_is_aborted(context: Any, callables: Any, function: str) -> None:
    given, end = context(f'call = "feeders:{function}"')
    eventually(callables)
    given.stop.set(JobAborted("the process was asked to stop"))

    assert (end().outcome, end().reason) == ("aborted", "the process was asked to stop")


def test_one_that_never_looks_and_does_all_its_work_has_succeeded(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:deaf"\nargs = [0.3]')
    eventually(callables)
    given.stop.set(JobAborted("the process was asked to stop"))

    assert end().outcome == "succeeded"
    assert callables() == ["begun", "done"]


def test_one_that_overruns_its_time_is_recorded_as_timed_out(run: Run, callables: Any) -> None:
    assert run('call = "feeders:deaf"\nargs = [0.3]\ntimeout = "0.1s"').outcome == "timed_out"
    assert callables() == ["begun", "done"]


def test_one_that_does_not_end_is_killed_with_all_that_it_started(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:never_end"')
    eventually(callables)
    given.time_out()

    report = end()

    assert report.outcome == "timed_out"
    assert report.reason == "longer than its timeout of 600 s; it did not end within 10 s and was killed"
    (pids,) = callables()
    eventually(lambda: not any(map(is_alive, pids)))


def test_a_reason_to_stop_may_leave_less_time_than_another_that_came_first(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:never_end"')
    eventually(callables)
    given.stop.set(JobAborted("the process was asked to stop", grace_seconds=1000))
    given.stop.set(JobAborted("it may be taken for dead", grace_seconds=0.5))

    assert (end().outcome, end().reason) == (
        "aborted",
        "the process was asked to stop; it did not end within 0.5 s and was killed",
    )


def test_at_the_deadline_of_its_run_it_is_killed(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:never_end"')
    eventually(callables)
    given.deadline.set(elapsed_seconds() + 1000)
    given.stop.set(JobAborted("it may be taken for dead", grace_seconds=1000))
    given.deadline.set(elapsed_seconds() + 0.2)

    assert (end().outcome, end().reason) == (
        "aborted",
        "it may be taken for dead; it did not end before others may run it, and was killed",
    )
    (pids,) = callables()
    eventually(lambda: not any(map(is_alive, pids)))


def test_a_process_serves_its_job_again_as_long_as_it_is_there(
    crons_for: Callable[[str], Crons], callables: Any
) -> None:
    crons = crons_for('call = "feeders:whoami"')
    for _ in range(3):
        crons.run("report")

    assert len(callables()) == 3
    assert len(set(callables())) == 1
    assert callables()[0] != os.getpid()


def test_after_one_that_died_the_next_run_has_a_process_of_its_own(
    crons_for: Callable[[str], Crons], callables: Any
) -> None:
    crons = crons_for('call = "feeders:whoami"')
    crons.run("report")
    os.kill(callables()[0], signal.SIGKILL)  # while it idles: nobody has to hear of it

    assert crons.run("report").outcome == "succeeded"
    assert len(set(callables())) == 2


@pytest.mark.parametrize("function", ["silence", "close_the_streams", "leave_behind"])
def test_what_it_changes_in_its_process_is_made_good_for_the_next_run(
    crons_for: Callable[[str], Crons], callables: Any, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    caplog.set_level(logging.INFO)
    crons = crons_for(f'call = "feeders:first"\nargs = ["{function}"]')

    assert crons.run("report").outcome == "succeeded"
    assert crons.run("report").outcome == "succeeded"

    assert {entry["line"] for entry in events(caplog) if entry["event"] == "job_output"} >= {"one", "five", "six"}
    assert "four" in [record.getMessage() for record in caplog.records]


def test_what_it_leaves_behind_keeps_nothing_from_closing_and_ends_with_it(
    crons_for: Callable[[str], Crons], callables: Any
) -> None:
    crons = crons_for('call = "feeders:leave_behind"')
    assert crons.run("report").outcome == "succeeded"
    crons.close()

    (pids,) = callables()
    eventually(lambda: not any(map(is_alive, pids)))


def test_a_reload_takes_new_code(crons_for: Callable[[str], Crons], callables: Any, tmp_path: Path) -> None:
    crons = crons_for('call = "feeders:Namespace.inner"')
    crons.run("report")
    code = tmp_path / "feeders.py"
    code.write_text(code.read_text().replace('see("inner")', 'see("another inner")'))
    crons.run("report")
    crons.reload(load(crons.settings.path))
    crons.run("report")

    assert callables() == ["inner", "inner", "another inner"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_dies_takes_its_callables_and_all_that_they_started_along(
    crons_for: Callable[[str], Crons], callables: Any, how: signal.Signals, tmp_path: Path
) -> None:
    path = crons_for('call = "feeders:never_end"').settings.path
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from catfeeder_cron import Crons; "
    embedding = subprocess.Popen([sys.executable, "-c", f'{program} Crons(config={str(path)!r}).run("report")'])
    eventually(callables)
    embedding.send_signal(how)
    embedding.wait(20)

    (pids,) = callables()
    eventually(lambda: not any(map(is_alive, pids)))


def events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record)["event_dict"] for record in caplog.records if hasattr(record, "event_dict")]


def job_of_context() -> str:
    """The job that is named in entries that this thread logs now."""
    from structlog.contextvars import get_contextvars

    return str(get_contextvars().get("job"))
