"""Jobs that only exist in config.toml: what a statement of SQL or a Python callable does, and how its run ends."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import Crons
from catfeeder_cron.errors import JobAborted
from catfeeder_cron.job import JobContext, JobReport
from catfeeder_cron.runner import run_job

CALLABLES = """
import asyncio
import concurrent.futures
import logging
import sys
import threading
import time

import catfeeder_cron

seen = []


def note(*args, **kwargs):
    seen.append((args, kwargs))
    kwargs.get("list", []).append("changed")


async def note_later(what):
    await asyncio.sleep(0)
    seen.append(what)


class Awaitable:
    def __await__(self):
        seen.append("awaited")
        return iter(())


def awaitable():
    return Awaitable()


def generator():
    yield seen.append("never")


async def async_generator():
    yield seen.append("never")


def fail():
    raise ValueError("no\\ncat")


def interrupt():
    raise KeyboardInterrupt


async def cancelled():
    raise asyncio.CancelledError


def leave(status):
    sys.exit(status)


def speak():
    print("one\\ntwo")
    sys.stderr.write("three")
    logging.getLogger("reports").warning("four")
    thread = threading.Thread(target=print, args=("five",))
    thread.start()
    thread.join()


def mutter():
    for _ in range(20_000):
        sys.stdout.write(".")


def until_stopped():
    seen.append("begun")
    while not catfeeder_cron.stopping():
        time.sleep(0.01)


def deaf(seconds):
    seen.append("begun")
    time.sleep(seconds)
    seen.append("done")


async def patient():
    seen.append("begun")
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        seen.append("cleaned up")


async def stubborn():
    for _ in range(2):
        try:
            seen.append("begun")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass


class Namespace:
    @staticmethod
    def inner():
        seen.append("inner")


number = 7
"""

Run = Callable[..., JobReport]


@pytest.fixture
def callables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `feeders`, freshly imported by the first job that names it."""
    (tmp_path / "feeders.py").write_text(CALLABLES)
    (tmp_path / "script.py").write_text("import sys\nprint('at import')\nsys.exit(3)\n")
    (tmp_path / "broken.py").write_text("def main(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["feeders"].seen
    for name in ("feeders", "script", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def crons_for(database_url: str, tmp_path: Path) -> Iterator[Callable[[str], Crons]]:
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
        given = crons._open().workshop.context("report")
        reports: list[JobReport] = []
        thread = threading.Thread(target=lambda: reports.append(run_job(job, given, settings)))

        def end() -> JobReport:
            thread.join(20)
            return reports[0]

        thread.start()
        return given, end

    return prepare


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    begun = time.monotonic()
    report = run('sql = "SELECT pg_sleep(60)"\ntimeout = "0.3s"')

    assert report.outcome == "timed_out"
    assert time.monotonic() - begun < 10


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

    given = (("cats", 2), {"list": [1, "changed"], "deep": {"a": True}})
    assert callables() == [given, given]


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        ('call = "feeders:note_later"\nargs = ["later"]', ["later"]),
        ('call = "feeders:awaitable"', ["awaited"]),
        ('call = "feeders:Namespace.inner"', ["inner"]),
        ('call = "feeders:leave"\nargs = [0]', []),
    ],
)
def test_what_can_be_called_or_awaited_is(run: Run, callables: Any, lines: str, seen: list[str]) -> None:
    assert run(lines).outcome == "succeeded"
    assert callables() == seen


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('call = "feeders:fail"', "ValueError: see the log"),
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
    ],
)
def test_whatever_a_callable_ends_in_its_run_fails_with_a_reason_in_one_line(run: Run, lines: str, reason: str) -> None:
    report = run(lines)

    assert report.outcome == "failed"
    assert report.reason is not None
    assert report.reason.startswith(reason)
    assert "\n" not in report.reason


def test_a_keyboard_interrupt_in_a_worker_thread_is_a_failure_like_any_other(context: Any) -> None:
    _, end = context('call = "feeders:interrupt"')

    assert (end().outcome, end().reason) == ("failed", "it raised KeyboardInterrupt")


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


def test_what_it_prints_and_logs_carries_its_name_and_the_streams_are_given_back(
    run: Run, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = sys.stdout, sys.stderr
    caplog.set_level(logging.INFO)

    run('call = "feeders:speak"')

    printed = [record.event_dict for record in caplog.records if hasattr(record, "event_dict")]
    lines = {entry["line"]: entry["job"] for entry in printed if entry["event"] == "job_output"}
    assert lines == dict.fromkeys(("one", "two", "three", "five"), "report")
    assert capsys.readouterr() == ("", "")
    assert (sys.stdout, sys.stderr) == streams


def test_a_line_without_end_is_told_in_pieces(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    run('call = "feeders:mutter"')

    pieces = [vars(record)["event_dict"]["line"] for record in caplog.records if "job_output" in record.getMessage()]
    assert sum(map(len, pieces)) == 20_000
    assert max(map(len, pieces)) < 10_000


def test_a_handler_that_writes_to_standard_output_does_not_log_the_log(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    class ToStandardOutput(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage())

    handler = ToStandardOutput()
    logger = logging.getLogger("catfeeder_cron.output")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        run('call = "feeders:speak"')
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)

    assert capsys.readouterr().out.count("job_output") == 4


def test_a_callable_that_looks_is_stopped_by_its_timeout(run: Run) -> None:
    report = run('call = "feeders:until_stopped"\ntimeout = "0.2s"')

    assert (report.outcome, report.reason) == ("timed_out", "longer than its timeout of 0.2 s")


def test_a_coroutine_is_cancelled_at_its_timeout_and_may_clean_up(run: Run, callables: Any) -> None:
    report = run('call = "feeders:patient"\ntimeout = "0.2s"')

    assert report.outcome == "timed_out"
    assert callables() == ["begun", "cleaned up"]


def test_a_coroutine_that_resists_is_cancelled_again(run: Run, callables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run('call = "feeders:stubborn"\ntimeout = "0.2s"')

    assert report.outcome == "timed_out"
    assert callables() == ["begun", "begun"]
    assert report.duration.total_seconds() < 10


def test_one_that_is_asked_to_stop_and_looks_is_aborted(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:until_stopped"')
    wait_for(lambda: "feeders" in sys.modules and callables())
    given.stop.set(JobAborted("the process was asked to stop"))

    assert (end().outcome, end().reason) == ("aborted", "the process was asked to stop")


def test_one_that_never_looks_and_does_all_its_work_has_succeeded(context: Any, callables: Any) -> None:
    given, end = context('call = "feeders:deaf"\nargs = [0.3]')
    wait_for(lambda: "feeders" in sys.modules and callables())
    given.stop.set(JobAborted("the process was asked to stop"))

    assert end().outcome == "succeeded"
    assert callables() == ["begun", "done"]


def test_one_that_overruns_its_time_is_recorded_as_timed_out(run: Run, callables: Any) -> None:
    assert run('call = "feeders:deaf"\nargs = [0.3]\ntimeout = "0.1s"').outcome == "timed_out"
    assert callables() == ["begun", "done"]
