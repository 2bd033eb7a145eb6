"""Where there are threads, one alone imports what was not imported before: two that do can wait for each other.

The interpreters that end this with a _DeadlockError need not be at hand to see it: an observer in the process tells
which thread imports what.
"""

import json
import sys
import urllib.request
from collections import defaultdict
from pathlib import Path

import psycopg
import pytest

from tests.integration.oauth.provider import Provider, reply, running
from tests.support.program import Program, count
from tests.support.waiting import eventually

# Writes a line for each first import: process, module, thread, whether a thread had been started by then.
OBSERVER = """
import json, os, sys, threading
from importlib.machinery import PathFinder

begun = False
file = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
start = threading.Thread.start

def noted_start(thread):
    global begun
    begun = True
    start(thread)

class Observer:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path)
        if spec and (name.startswith("catfeeder_cron.") or "-packages" in str(spec.origin)):
            line = json.dumps([os.getpid(), name, threading.current_thread().name, begun])
            os.write(file, line.encode() + b"\\n")

threading.Thread.start = noted_start
sys.meta_path.insert(0, Observer())
"""

EVERY_KIND_OF_JOB = """
    [metrics]
    listen = "127.0.0.1:0"
    [actions.webhook]
    allowed = ["{url}"]
    [jobs.renew-oauth]
    interval = 1
    [jobs.reset-food-counters]
    enabled = true
    interval = 1
    [jobs.forget]
    sql = "DELETE FROM \\"Verification\\""
    cron = "*/15 * * * *"
    [jobs.clean-tokens]
    interval = 1
    ping_url = "{url}ping"
    [jobs.call]
    call = "json:loads"
    args = ["1"]
    interval = 1
    """

ADD_LINK = """
    WITH service AS (INSERT INTO "Services" (name) VALUES ('acme') RETURNING id),
         provider AS (
            INSERT INTO "UserOauthConnection" (provider_name, client_id, client_secret, token_grabber_base_url)
            VALUES ('acme', 'id', 'secret', %(url)s))
    INSERT INTO "ActiveOauths" (token, token_expiration, token_lifespan, refresh_link, service_id, user_id)
    SELECT 'old', now() + interval '1 min', 3600, %(refresh_token)s, id, 7 FROM service"""

# Threads that meet the package, and log, at the same moment.
EMBEDDING = """
import threading
import catfeeder_cron

together = threading.Barrier(8)

def use(number):
    together.wait()
    if number % 2:
        catfeeder_cron.BackgroundTasks().safe_add_task("not callable")
    else:
        with catfeeder_cron.Crons() as crons:
            crons.clean_expired_tokens()

threads = [threading.Thread(target=use, args=[number]) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


class Observed:
    def __init__(self, folder: Path) -> None:
        self._file = folder / "imports"
        hook = folder / "observer"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(OBSERVER.format(path=str(self._file)))
        self.variables = {"PYTHONPATH": str(hook)}

    def by_thread(self, pid: int | None = None) -> dict[str, list[str]]:
        """Return what was imported after the first thread had begun, in this process."""
        modules = defaultdict(list)
        for process, module, thread, begun in map(json.loads, self._file.read_text().splitlines()):
            # The folders of time zones are packages without code.
            if begun and pid in (None, process) and not module.startswith("tzdata"):
                modules[thread].append(module)
        return modules


@pytest.fixture
def observed(tmp_path: Path) -> Observed:
    return Observed(tmp_path)


@pytest.mark.usefixtures("app_tables")
def test_a_daemon_imports_in_one_thread_whatever_its_jobs_need(
    program: Program, admin: psycopg.Connection, database_url: str, observed: Observed
) -> None:
    with running(Provider()) as provider, running(Provider(script=lambda _: reply(200))) as listener:
        url = listener.url.removesuffix("token")
        program.configure(database_url, EVERY_KIND_OF_JOB.format(url=url))
        admin.execute(ADD_LINK, {"url": provider.url, "refresh_token": provider.log_in("tom")})
        admin.execute(
            "INSERT INTO \"Actions\" (kind, due_at, payload) VALUES ('webhook', now(), %s)",
            [json.dumps({"url": f"{url}hook"})],
        )
        daemon = program.start_installed("start", variables=observed.variables)
        port = daemon.wait_for("metrics_served")["port"]
        eventually(lambda: provider.renewals["tom"], "a renewal")
        eventually(lambda: {"/hook", "/ping"} <= {request.path for request in listener.requests}, "webhook and ping")
        ended = "(SELECT DISTINCT job FROM catfeeder_cron.job_runs WHERE outcome IS NOT NULL AND missed IS NULL) ended"
        jobs = {"renew-oauth", "reset-food-counters", "clean-tokens", "call", "check-actions"}
        eventually(lambda: count(admin, ended) >= len(jobs), "a run of each job")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as metrics:
            assert b"catfeeder_cron_build_info" in metrics.read()
        eventually(lambda: count(admin, "\"Actions\" WHERE state = 'done'"), "the action's end")
        assert daemon.stop().status == 0

    modules = observed.by_thread(daemon.pid)
    assert list(modules) == ["imports"], modules
    assert {"aiohttp", "httpx", "prometheus_client", "anyio._backends._asyncio"} <= {*modules["imports"]}


def test_a_daemon_without_its_database_has_imported_all_that_it_uses_before_its_first_thread(
    program: Program, observed: Observed
) -> None:
    program.configure("postgresql://127.0.0.1:1/nowhere")
    daemon = program.start_installed("start", variables=observed.variables)
    daemon.wait_for("database_unreachable")
    daemon.wait_for("daemon_started")
    assert daemon.stop().status == 0
    assert not observed.by_thread(daemon.pid)


@pytest.mark.usefixtures("app_tables")
def test_threads_of_a_program_that_embeds_it_import_nothing_themselves(program: Program, observed: Observed) -> None:
    (program.folder / "program.py").write_text(EMBEDDING)
    ended = program.run_command(sys.executable, "-W", "error", "program.py", variables=observed.variables)
    assert ended.status == 0, ended.stderr
    modules = observed.by_thread()
    assert {"psycopg", "apscheduler", "structlog"} <= {*modules["imports"]}
    assert all(module.startswith("catfeeder_cron") for name in modules.keys() - {"imports"} for module in modules[name])
