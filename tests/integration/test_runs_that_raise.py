"""Whatever is raised, by a job or around it, its run ends with an outcome, and everything else goes on."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import Crons
from catfeeder_cron.config import JobSettings
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.listeners import Run, RunListener
from tests.integration.daemons import Work, rows
from tests.support.waiting import eventually

NO_SUCH_PING = '\nping_url = "http://127.0.0.1:1/"'


class Unheard(BaseException):
    """Not an Exception, and none that Python knows."""


@pytest.fixture
def open_crons(with_schema: None, database_url: str, tmp_path: Path) -> Iterator[Callable[..., Crons]]:
    """Opens one whose jobs run every second."""
    opened: list[Crons] = []

    def open_one(*jobs: Job[Any], options: str = "", **keywords: Any) -> Crons:
        config = tmp_path / "config.toml"
        tables = "".join(f"[jobs.{job.id}]\ninterval = 1\n{options}\n" for job in jobs)
        config.write_text(f'[database]\nurl = "{database_url}"\n{tables}')
        config.chmod(0o600)
        opened.append(Crons(config=config, jobs={job.id: job for job in jobs}, **keywords))
        return opened[-1]

    yield open_one
    for crons in opened:
        crons.close()


def raising(error: BaseException) -> Job[JobSettings]:
    def run(context: JobContext, _settings: JobSettings) -> None:
        context.counts["deleted"] = 3
        raise error

    return Job(id="raising", summary="raise", settings=JobSettings, run=run)


@pytest.mark.parametrize(
    "error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, Unheard]
)
def test_a_job_on_the_schedule_may_raise_anything(
    open_crons: Callable[..., Crons],
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    other = Work("other")
    crons = open_crons(raising(error("the bowl fell")), other.job)
    crons.inject_crons()
    eventually(lambda: caplog.text.count("job_raised") >= 2)
    ran = other.runs
    eventually(lambda: other.runs > ran)
    crons.close()

    outcomes = set(rows(admin, "outcome, reason, counts->>'deleted'", "job = 'raising' AND missed IS NULL"))
    assert outcomes == {("failed", f"{error.__name__}: see the log for the traceback", "3")}
    record = next(record for record in caplog.records if "job_raised" in record.getMessage())
    assert record.exc_info
    assert record.exc_info[0] is error


@pytest.mark.parametrize("error", [GeneratorExit, asyncio.CancelledError, Unheard])
def test_a_job_that_is_run_by_hand_may_too(
    open_crons: Callable[..., Crons], admin: psycopg.Connection, error: type[BaseException]
) -> None:
    report = open_crons(raising(error())).run("raising")
    assert (report.outcome, report.reason) == ("failed", f"{error.__name__}: see the log for the traceback")
    assert rows(admin, "outcome") == [("failed",)]


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)


def terminated() -> None:
    def end(_number: int, _frame: object) -> None:
        raise SystemExit(3)

    before = signal.signal(signal.SIGTERM, end)
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("ending", "error"), [(interrupted, KeyboardInterrupt), (terminated, SystemExit)])
def test_what_is_to_end_the_program_does_so_when_the_run_is_recorded(
    open_crons: Callable[..., Crons],
    admin: psycopg.Connection,
    ending: Callable[[], None],
    error: type[BaseException],
) -> None:
    def run(context: JobContext, _settings: JobSettings) -> None:
        context.counts["deleted"] = 3
        ending()

    crons = open_crons(Job(id="work", summary="work", settings=JobSettings, run=run))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            crons.run("work")
    finally:
        signal.signal(signal.SIGINT, before)
    found = rows(admin, "outcome, reason, counts->>'deleted'")
    assert found == [("aborted", f"the program was interrupted by {error.__name__}", "3")]
    assert crons.running == []


@pytest.mark.parametrize("error", [LookupError, Unheard])
@pytest.mark.parametrize("called", ["when it begins", "when it ends", "for its progress"])
def test_what_is_told_of_a_run_may_raise(
    open_crons: Callable[..., Crons],
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
    called: str,
) -> None:
    main = threading.current_thread()

    class Raising(RunListener):
        def began(self, _run: Run, /) -> None:
            if threading.current_thread() is main and called == "when it begins":
                raise error

        def ended(self, _run: Run, _report: JobReport, /) -> None:
            if threading.current_thread() is main and called == "when it ends":
                raise error

    def progress(_done: int, _total: int) -> None:
        if called == "for its progress":
            raise error

    def run(context: JobContext, _settings: JobSettings) -> None:
        context.progress(1, 2)

    crons = open_crons(Job(id="work", summary="work", settings=JobSettings, run=run))
    crons.listen(Raising())
    outcome = "failed" if called == "for its progress" else "succeeded"
    assert crons.run("work", progress=progress).outcome == outcome
    assert rows(admin, "outcome") == [(outcome,)]
    assert crons.running == []
    assert "Traceback" in caplog.text


def test_heartbeats_go_on_whatever_the_one_raises_who_is_told_of_them(
    open_crons: Callable[..., Crons], admin: psycopg.Connection
) -> None:
    told = threading.Semaphore(0)

    class Raising(RunListener):
        def began(self, _run: Run, /) -> None:
            told.release()
            raise Unheard

        def beat(self, _reached: bool, /) -> None:
            told.release()
            raise Unheard

    work = Work()
    crons = open_crons(work.job)
    crons.listen(Raising())
    crons.inject_crons()
    for _ in range(3):
        assert told.acquire(timeout=60)
        crons._open().supervisor._wake_heartbeat.set()
    eventually(lambda: rows(admin, "*", "outcome = 'succeeded'"))


def test_the_one_who_is_told_of_the_first_contact_may_raise(
    open_crons: Callable[..., Crons], admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(RunListener):
        def beat(self, _reached: bool, /) -> None:
            raise LookupError

    crons = open_crons(Work().job)
    crons.listen(Raising())
    assert crons.run("work").outcome == "succeeded"
    assert rows(admin, "outcome") == [("succeeded",)]
    assert "LookupError" in caplog.text


@pytest.mark.parametrize("count", [{"of": "cats"}, object(), "many"])
def test_a_report_that_can_not_be_written_down_leaves_no_run_open(
    open_crons: Callable[..., Crons], admin: psycopg.Connection, count: Any
) -> None:
    def run(context: JobContext, _settings: JobSettings) -> None:
        context.counts["deleted"] = count

    crons = open_crons(Job(id="work", summary="work", settings=JobSettings, run=run))
    for _ in range(2):  # the first must not be in the way of the second
        assert crons.run("work").outcome == "succeeded"
    assert rows(admin, "outcome, counts") == [("succeeded", {})] * 2


def test_no_thread_for_a_ping_is_no_reason_to_leave_a_run_open(
    open_crons: Callable[..., Crons], admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    crons = open_crons(Work().job, options=NO_SUCH_PING)
    crons._open().supervisor.beat()
    crons._open().supervisor.start()

    def start(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    assert crons.run("work").outcome == "succeeded"
    monkeypatch.undo()
    assert rows(admin, "outcome") == [("succeeded",)]
