"""Signs of life over HTTP: what is sent and in which order, that it disturbs no job, and that no address is told."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import SecretStr

from catfeeder_cron import Crons
from catfeeder_cron.config import JobSettings
from catfeeder_cron.report import JobReport, Outcome
from catfeeder_cron.run_control import RunControl
from catfeeder_cron.scheduler.listeners import Run
from catfeeder_cron.scheduler.pings import Pings
from tests.support.waiting import eventually

SECRET = "5f0c2d1e-7a3b-4c64-9f1e-0123456789ab"


class Checks:
    """A service on loopback that takes pings; `answer` says how."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str, str]] = []
        self.status = 200
        self.held = threading.Event()
        self.held.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                service.held.wait(30)
                service.received.append((self.command, self.path, body))
                self.send_response(service.status)
                if service.status // 100 == 3:
                    self.send_header("Location", f"{service.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - the name is the library's

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.held.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.received]


@pytest.fixture
def checks() -> Iterator[Checks]:
    checks = Checks()
    yield checks
    checks.close()


@pytest.fixture
def pings() -> Iterator[Pings]:
    pings = Pings()
    yield pings
    pings.close(0.1)


@pytest.fixture
def crons(with_schema: None, database_url: str, tmp_path: Path) -> Iterator[Callable[[str, str], Crons]]:
    opened: list[Crons] = []

    def open_one(ping_url: str, job: str) -> Crons:
        path = tmp_path / "config.toml"
        path.write_text(
            f'[database]\nurl = "{database_url}"\n[jobs.report]\ninterval = 3600\nping_url = "{ping_url}"\n{job}\n'
        )
        opened.append(Crons(config=path))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def test_a_run_is_told_of_at_its_start_and_its_success(crons: Callable[[str, str], Crons], checks: Checks) -> None:
    with crons(f"{checks.url}/{SECRET}?rid=7&tag=cats", "sql = 'SELECT 1'") as running:
        running.run("report")

    assert checks.received == [
        ("POST", f"/{SECRET}/start?rid=7&tag=cats", ""),
        ("POST", f"/{SECRET}?rid=7&tag=cats", ""),
    ]


def test_a_failure_is_told_with_its_reason(crons: Callable[[str, str], Crons], checks: Checks) -> None:
    with crons(f"{checks.url}/{SECRET}/", "sql = 'SELECT 1 / 0'") as running:
        running.run("report")

    (_, started, _), (_, failed, text) = checks.received
    assert (started, failed) == (f"/{SECRET}/start", f"/{SECRET}/fail")
    assert text == "division by zero (SQLSTATE 22012)"


def a_run(job: str, address: str) -> Run:
    settings = JobSettings.model_construct(ping_url=SecretStr(address))
    return Run(1, job, settings, RunControl(timeout=timedelta(seconds=60)))


def a_report(job: str, outcome: Outcome = "succeeded", reason: str | None = None) -> JobReport:
    return JobReport(job, outcome, reason, {}, datetime.now(UTC), timedelta(seconds=1), dry_run=False)


def test_a_dry_run_is_no_sign_of_life(crons: Callable[[str, str], Crons], checks: Checks) -> None:
    with crons(f"{checks.url}/{SECRET}", "sql = 'SELECT 1'") as running:
        running.run("report", dry_run=True)

    assert checks.received == []


def test_a_check_that_hangs_delays_neither_its_job_nor_another_jobs_pings(pings: Pings, checks: Checks) -> None:
    checks.held.clear()
    other = Checks()
    runs = [a_run("slow", f"{checks.url}/{SECRET}"), a_run("quick", f"{other.url}/{SECRET}")]
    for run in runs:
        pings.began(run)
    for run in runs:
        pings.ended(run, a_report(run.job_id))

    eventually(lambda: len(other.received) == 2)
    assert other.paths == [f"/{SECRET}/start", f"/{SECRET}"]
    assert checks.received == []
    other.close()


def test_the_end_of_the_process_waits_for_pings_only_so_long(
    pings: Pings, checks: Checks, caplog: pytest.LogCaptureFixture
) -> None:
    checks.held.clear()
    pings.ended(a_run("report", f"{checks.url}/{SECRET}"), a_report("report"))

    pings.close(0.2)

    assert checks.received == []
    assert "no answer before the end of this process" in caplog.text


@pytest.mark.parametrize("status", [301, 302, 307, 404, 500])
def test_a_check_that_refuses_or_redirects_fails_no_job_and_leads_nowhere(
    crons: Callable[[str, str], Crons], checks: Checks, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    checks.status = status
    with crons(f"{checks.url}/{SECRET}", "sql = 'SELECT 1'") as running:
        assert running.run("report").outcome == "succeeded"

    assert checks.paths == [f"/{SECRET}/start", f"/{SECRET}"]
    assert [entry.count(f"status={status}") for entry in caplog.messages if "ping_refused" in entry] == [1, 1]
    assert SECRET not in caplog.text


def test_no_server_at_all_fails_no_job_and_is_told_without_the_address(
    crons: Callable[[str, str], Crons], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}"
        with crons(address, "sql = 'SELECT 1'") as running:
            assert running.run("report").outcome == "succeeded"

    assert "reason=ConnectionRefusedError" in caplog.text
    assert SECRET not in caplog.text


def test_an_address_that_is_not_ascii_is_quoted(pings: Pings, checks: Checks) -> None:
    run = a_run("report", f"{checks.url}/caf\u00e9%20cat?q=\u00e9#part")
    pings.ended(run, a_report("report", "failed", "na\u00efve \ud800"))
    pings.close()

    assert checks.received == [("POST", "/caf%C3%A9%20cat/fail?q=%C3%A9", "na\u00efve ?")]
