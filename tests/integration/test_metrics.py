"""Metrics and health, asked for over HTTP: of a real daemon, and of parts of one where a state is hard to come by."""

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from catfeeder_cron.config import DatabaseSettings, JobSettings
from catfeeder_cron.database import Database
from catfeeder_cron.jobs import load_settings
from catfeeder_cron.ledger.history import Account
from catfeeder_cron.ledger.snapshot import SnapshotReader
from catfeeder_cron.report import JobReport
from catfeeder_cron.run_control import RunControl
from catfeeder_cron.scheduler.crons import Crons
from catfeeder_cron.scheduler.listeners import Run
from catfeeder_cron.service.endpoints import Endpoints, Page
from catfeeder_cron.service.health import Health
from catfeeder_cron.service.metrics import Metrics
from tests.support.program import Program, Running
from tests.support.waiting import SOON, eventually

MINUTE = timedelta(minutes=1)


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def samples(text: str) -> dict[str, float]:
    """Return the samples by name and labels, without the program's prefix."""
    found = re.findall(r"(?m)^catfeeder_cron_(\S+) (\S+)$", text)
    return {name: float(value) for name, value in found}


Start = Callable[..., tuple[Running, int]]


@pytest.fixture
def start(program: Program) -> Start:
    """Starts a daemon; returns it and the port of its metrics, 0 where it has none."""

    def start(url: str, jobs: str, listen: str = "127.0.0.1:0") -> tuple[Running, int]:
        logging = 'connect_timeout = 1\n[logging]\nformat = "json"\n'
        program.configure(url, f'{logging}[metrics]\nlisten = "{listen}"\n{jobs}')
        daemon = program.start("start")
        told = eventually(lambda: [*daemon.events("metrics_served"), *daemon.events("metrics_not_served")])
        return daemon, told[0].get("port", 0)

    return start


def test_a_running_daemon_tells_its_runs_its_slots_and_that_all_is_well(start: Start, database_url: str) -> None:
    jobs = '[jobs.test-hello-world]\nenabled = true\ninterval = "1s"\n[jobs.clean-tokens]\ninterval = "1s"\n'
    began = datetime.now(UTC).timestamp()
    daemon, port = start(database_url, jobs)
    hello = 'job="test-hello-world"'

    def metrics() -> dict[str, float]:
        return samples(get(port, "/metrics")[1])

    def ran() -> dict[str, float] | None:
        found = metrics()
        runs = found.get(f'job_runs_total{{{hello},outcome="succeeded"}}', 0)
        failures = found.get('job_runs_total{job="clean-tokens",outcome="failed"}', 0)
        return (
            found if runs >= 2 and failures >= 1 and f"job_last_success_timestamp_seconds{{{hello}}}" in found else None
        )

    found = eventually(ran)  # clean-tokens finds no table
    assert found[f'job_runs_total{{{hello},outcome="timed_out"}}'] == 0
    assert found[f"job_duration_seconds_count{{{hello}}}"] == found[f'job_runs_total{{{hello},outcome="succeeded"}}']
    now = datetime.now(UTC).timestamp()
    assert began <= found[f"job_last_success_timestamp_seconds{{{hello}}}"] <= now
    assert began < found[f"job_next_slot_timestamp_seconds{{{hello}}}"] < now + 2
    assert found["database_up"] == 1
    assert found['pool_connections{state="idle"}'] + found['pool_connections{state="in_use"}'] >= 1
    assert found[f"job_stuck{{{hello}}}"] == 0
    assert get(port, "/health") == (200, '{"status": "ok", "reasons": []}\n')
    assert get(port, "/ready") == (200, '{"status": "ok", "reasons": []}\n')
    assert get(port, "/ready", "HEAD") == (200, "")
    assert get(port, "/other?x=1")[0] == 404
    assert daemon.stop().status == 0


def test_a_daemon_without_a_database_is_healthy_and_not_ready(start: Start) -> None:
    _, port = start("postgresql://cat:hunter2@127.0.0.1:9/x", "")
    assert get(port, "/health")[0] == 200
    status, body = get(port, "/ready")
    assert status == 503
    (reason,) = json.loads(body)["reasons"]
    assert reason.startswith("the database is unreachable: no connection to the database: ")
    text = get(port, "/metrics")[1]
    assert samples(text)["database_up"] == 0
    assert "hunter2" not in text + body


def test_an_address_that_is_taken_costs_the_metrics_and_not_the_daemon(start: Start, database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        jobs = '[jobs.test-hello-world]\nenabled = true\ninterval = "1s"\n'
        daemon, _ = start(database_url, jobs, address)
        with psycopg.connect(database_url, autocommit=True) as connection:
            ledger = "SELECT to_regclass('catfeeder_cron.job_runs') IS NOT NULL"
            eventually(lambda: connection.execute(ledger).fetchone() == (True,))
            runs = "SELECT FROM catfeeder_cron.job_runs WHERE outcome = 'succeeded'"
            eventually(lambda: connection.execute(runs).fetchall())
            assert daemon.stop().status == 0


@pytest.fixture
def parts(tmp_path: Path, database_url: str) -> Iterator[tuple[Crons, Database, Health]]:
    """A daemon's parts whose schedule is never started: its jobs' slots go by."""
    (path := tmp_path / "config.toml").write_text(f'[database]\nurl = "{database_url}"\n')
    settings = load_settings(path, environ={})
    with Database(settings.database) as database, Crons(config=settings, database=database) as crons:
        yield crons, database, Health(crons, database, MINUTE)


RUN = Run(1, "job", JobSettings(), RunControl(timeout=MINUTE))


def report(job: str, counts: dict[str, int], by_provider: dict[str, dict[str, int]] | None = None) -> JobReport:
    return JobReport(
        job, "succeeded", None, counts, datetime.now(UTC), timedelta(seconds=2), dry_run=False,
        by_provider=by_provider or {},
    )  # fmt: skip


def test_what_jobs_did_is_added_up(parts: tuple[Crons, Database, Health]) -> None:
    metrics = Metrics(*parts)
    for _ in range(2):
        metrics.ended(RUN, report("clean-tokens", {"deleted": 5, "remaining": 1}))
        metrics.ended(RUN, report("check-actions", {"due": 3, "done": 2, "retried": 1, "given_up": 0}))
        metrics.ended(
            RUN, report("renew-oauth", {}, {"spotify": {"renewed": 7, "needs_reauth": 1}, "x": {"failed": 1}})
        )

    found = samples(metrics.page().body.decode())

    assert found['rows_removed_total{job="clean-tokens"}'] == 10
    assert found['actions_total{result="done"}'] == 4
    assert found['actions_total{result="retried"}'] == 2
    assert found['tokens_renewed_total{provider="spotify"}'] == 14
    assert found['tokens_needing_login_total{provider="spotify"}'] == 2
    assert found['tokens_renewed_total{provider="x"}'] == 0
    assert found['job_duration_seconds_bucket{job="clean-tokens",le="1.0"}'] == 0
    assert found['job_duration_seconds_bucket{job="clean-tokens",le="5.0"}'] == 2


def test_a_job_is_overdue_when_more_than_two_intervals_went_by_untold(
    parts: tuple[Crons, Database, Health], database_url: str
) -> None:
    crons, database, condition = parts
    assert crons.inject_crons() == 0

    def account() -> Account | None:
        return SnapshotReader(database, lambda: ["clean-tokens"]).now().accounts.get("clean-tokens")

    # The schedule keeps no account before the first contact.
    eventually(lambda: (found := account()) and found.accounted_until)
    schedule = crons.schedules["clean-tokens"]
    last = schedule.between(datetime.now(UTC) - timedelta(hours=5), datetime.now(UTC))
    assert last is not None
    for slots_untold, reasons in (
        (2, []),
        (3, [f"clean-tokens is overdue since {(last.last - timedelta(hours=1)).isoformat(timespec='seconds')}"]),
    ):
        with psycopg.connect(database_url) as connection:
            connection.execute(
                "UPDATE catfeeder_cron.schedule SET accounted_until = %s WHERE job = 'clean-tokens'",
                [last.last - slots_untold * timedelta(minutes=30)],
            )
        assert condition.readiness_problems(SnapshotReader(database, lambda: ["clean-tokens"]).now()) == reasons


def test_health_fails_when_the_loop_no_longer_turns_and_not_while_stopping(
    parts: tuple[Crons, Database, Health],
) -> None:
    crons, database, _ = parts
    condition = Health(crons, database, turn_every=timedelta(milliseconds=20))
    condition.turned()
    assert condition.liveness_problems() == []
    eventually(condition.liveness_problems)
    condition.turned()
    assert condition.liveness_problems() == []
    eventually(condition.liveness_problems)
    condition.stopping()
    assert condition.liveness_problems() == []


def test_a_database_that_hangs_holds_up_one_thread_and_nobody_who_asks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never says a word
        url = SecretStr(f"postgresql://cat@127.0.0.1:{silent.getsockname()[1]}/x")
        with Database(DatabaseSettings(url=url, connect_timeout=timedelta(hours=1))) as database:
            reader = SnapshotReader(database, list)
            before = threading.active_count()
            with ThreadPoolExecutor() as asking:
                answers = [asking.submit(reader.now) for _ in range(5)]
            for snapshot in [answer.result() for answer in answers]:
                assert not snapshot.reachable
                assert "has not answered" in (snapshot.trouble or "")
            assert threading.active_count() <= before + 3  # ours, the pool's worker and its scheduler


def test_the_server_sleeps_between_requests_and_ends_when_it_is_told() -> None:
    endpoints = Endpoints("127.0.0.1:0", {"/": lambda: Page(200, "text/plain", b"hello")})
    endpoints.open()
    assert get(endpoints.port, "/") == (200, "hello")
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "endpoints")
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def switches() -> list[str]:
        return re.findall(r"(?m)^voluntary_ctxt_switches:\s*(\d+)", status.read_text())

    before = eventually(lambda: switches() if "S (sleeping)" in status.read_text() else None)
    time.sleep(0.7)  # in which a server that polls would have woken up
    assert switches() == before
    port = endpoints.port
    endpoints.close()
    endpoints.close()
    thread.join(SOON)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        get(port, "/")


OUT_OF_FILES = """
import os, resource, socket, sys, time
from contextlib import suppress
from catfeeder_cron import logs
from catfeeder_cron.service.endpoints import Endpoints, Page

logs.configure("info", "json")
logs.get_logger("test").info("begun")  # which imports what logging needs
endpoints = Endpoints("127.0.0.1:0", {"/": lambda: Page(200, "text/plain", b"hello")})
endpoints.open()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
client, taken = socket.socket(), []
with suppress(OSError):
    while True:
        taken.append(os.dup(0))
before = time.process_time()
client.connect(("127.0.0.1", endpoints.port))
client.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
time.sleep(2.2)  # in which a server that tries again at once does nothing else, and ours tries twice
print(time.process_time() - before)
for each in taken:
    os.close(each)
print(client.makefile().read().splitlines()[-1])
endpoints.close()
"""


def test_a_server_without_a_free_file_descriptor_waits_for_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_FILES], capture_output=True, text=True, timeout=SOON, check=True
    )

    busy, answer = done.stdout.split()
    assert float(busy) < 0.3
    assert answer == "hello"
    assert done.stderr.count("connection_not_accepted") == 1


def test_a_page_that_fails_is_an_error_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Page:
        raise RuntimeError("broken")

    endpoints = Endpoints("[::1]:0", {"/": fail}) if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() else None
    if endpoints is None:
        pytest.skip("this machine has no IPv6")
    endpoints.open()
    connection = http.client.HTTPConnection("::1", endpoints.port, timeout=SOON)
    connection.request("GET", "/")
    assert connection.getresponse().status == 500
    endpoints.close()


def test_a_daemon_without_metrics_imports_none_of_it(tmp_path: Path) -> None:
    imported = "{'prometheus_client', 'http.server'} & sys.modules.keys()"
    code = f"import sys, catfeeder_cron.service.daemon; assert not {imported}"
    subprocess.run([sys.executable, "-c", code], check=True)
