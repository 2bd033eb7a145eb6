"""The service's life under systemd: start, status, reload, stop, stall, crash."""

import http.client
import json
import socket
from typing import LiteralString

import psycopg
import pytest

from tests.acceptance.systemd.doorway import Doorway
from tests.acceptance.systemd.machine import CONFIG, UNIT, URL_FILE, Machine
from tests.support.waiting import eventually

pytestmark = pytest.mark.systemd

DATABASE = f'[database]\nurl_file = "{URL_FILE}"\nconnect_timeout = 2\n'
EVERY_SECOND = DATABASE + '[jobs.clean-tokens]\ninterval = "1s"\n[jobs.clean-verification]\nenabled = false\n'
SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"

# Runs in every Python of the service: once told to, it holds the interpreter's lock for ever, as code in C may.
HOG = """
import ctypes, os, sys, threading, time
def hog():
    while not os.path.exists("/etc/hog/now"):
        time.sleep(0.05)
    print("the interpreter is held", file=sys.stderr, flush=True)
    ctypes.PyDLL(None).sleep(1000)
if "start" in sys.argv:
    threading.Thread(target=hog, daemon=True).start()
"""


def slow_deletes(app: psycopg.Connection, seconds: int) -> None:
    """Make each statement that deletes from "Connections" take so long, and give it something to delete."""
    app.execute(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN PERFORM pg_sleep({seconds:d}); RETURN NULL; END$$"
    )
    app.execute('CREATE TRIGGER slowly AFTER DELETE ON "Connections" FOR EACH STATEMENT EXECUTE FUNCTION slowly()')
    app.execute(
        'INSERT INTO "Connections" (token, user_id, expiration_date)'
        " SELECT n::text, 1, now() - interval '1 day' FROM generate_series(1, 10) n"
    )


def answer(app: psycopg.Connection, query: LiteralString) -> object:
    row = app.execute(query).fetchone()
    return row[0] if row else None


def test_start_returns_when_the_jobs_are_scheduled_and_status_tells_what_comes_next(service: Machine) -> None:
    service.systemctl("start", UNIT)
    assert service.show("Type") == "notify"
    assert "; next " in service.show("StatusText")
    assert "(4 scheduled)" in service.show("StatusText")
    assert 'Status: "' in service.run("systemctl", "status", UNIT)


def test_status_tells_what_is_running(service: Machine, app: psycopg.Connection) -> None:
    slow_deletes(app, 3)
    service.write(CONFIG, EVERY_SECOND)
    service.systemctl("start", UNIT)
    eventually(lambda: service.show("StatusText").startswith("running clean-tokens; next clean-tokens at "))
    eventually(lambda: service.show("StatusText").startswith("idle; "))


def test_a_database_that_comes_later_is_no_obstacle(
    service: Machine, doorway: Doorway, app: psycopg.Connection
) -> None:
    doorway.shut()
    service.write(CONFIG, EVERY_SECOND)
    service.systemctl("start", UNIT)
    eventually(lambda: service.show("StatusText").startswith("DATABASE UNREACHABLE: "))
    assert len(service.journal("EVENT=database_unreachable")) == 1
    doorway.open()
    eventually(lambda: service.show("StatusText").startswith(("idle", "running")))
    eventually(lambda: answer(app, "SELECT count(*) FROM catfeeder_cron.job_runs WHERE outcome = 'succeeded'"))
    assert service.show("NRestarts") == "0"
    assert "hunter2" not in service.messages()


def test_a_stop_lets_the_job_end_its_batch(service: Machine, app: psycopg.Connection) -> None:
    slow_deletes(app, 3)
    service.write(CONFIG, EVERY_SECOND)
    service.systemctl("start", UNIT)
    eventually(lambda: answer(app, SLEEPING))
    service.systemctl("stop", UNIT)
    assert service.show("Result") == "success"
    assert answer(app, "SELECT counts ->> 'deleted' FROM catfeeder_cron.job_runs ORDER BY run_id LIMIT 1") == "10"
    assert answer(app, 'SELECT count(*) FROM "Connections"') == 0
    assert answer(app, "SELECT count(*) FROM catfeeder_cron.daemons") == 0


def test_a_job_longer_than_the_stop_timeout_is_waited_for(service: Machine, app: psycopg.Connection) -> None:
    slow_deletes(app, 8)
    service.write(CONFIG, EVERY_SECOND)
    service.drop_in("TimeoutStopSec=2")
    service.systemctl("start", UNIT)
    eventually(lambda: answer(app, SLEEPING))
    service.systemctl("stop", UNIT)
    assert service.show("Result") == "success"
    assert answer(app, 'SELECT count(*) FROM "Connections"') == 0


def test_a_job_longer_than_the_grace_is_left_behind_and_recorded(service: Machine, app: psycopg.Connection) -> None:
    slow_deletes(app, 20)
    service.write(CONFIG, EVERY_SECOND + '[scheduler]\nshutdown_grace = "2s"\n')
    service.systemctl("start", UNIT)
    eventually(lambda: answer(app, SLEEPING))
    service.systemctl("stop", UNIT)
    assert service.show("Result") == "success"
    reason = answer(app, "SELECT reason FROM catfeeder_cron.job_runs WHERE outcome = 'aborted'")
    assert reason == "still running 2 s after the stop"


def test_a_stall_ends_in_a_restart_with_the_stacks_in_the_journal(service: Machine) -> None:
    service.write("/etc/hog/sitecustomize.py", HOG)
    service.run("rm", "-f", "/etc/hog/now")
    service.drop_in("WatchdogSec=3", "RestartSec=100ms", "Environment=PYTHONPATH=/etc/hog")
    service.systemctl("start", UNIT)
    service.run("sleep", "5")  # longer than the watchdog's patience: a loop that turns is left alone
    assert service.show("NRestarts") == "0"
    service.write("/etc/hog/now", "")
    eventually(lambda: "the interpreter is held" in service.messages())
    service.run("rm", "/etc/hog/now")
    eventually(lambda: service.show("NRestarts") == "1")
    eventually(lambda: service.show("ActiveState") == "active")
    said = service.messages()
    assert "Watchdog timeout" in said
    assert "Fatal Python error: Aborted" in said
    assert 'sitecustomize.py", line' in said
    assert "background_tasks.py" in said


def test_a_crash_ends_in_a_restart(service: Machine) -> None:
    service.drop_in("RestartSec=100ms")
    service.systemctl("start", UNIT)
    service.systemctl("kill", "--signal=SEGV", UNIT)
    eventually(lambda: service.show("NRestarts") == "1")
    eventually(lambda: service.show("StatusText").startswith("idle"))
    assert "Fatal Python error: Segmentation fault" in service.messages()


def test_the_service_gets_the_address_as_a_credential_that_its_user_could_not_read_otherwise(service: Machine) -> None:
    service.systemctl("start", UNIT)
    eventually(lambda: service.show("StatusText").startswith("idle"))
    assert service.run("stat", "-c", "%U %a", URL_FILE) == "root 600\n"
    user = service.run("stat", "-c", "%u", f"/proc/{service.show('MainPID')}").strip()
    assert service.attempt("setpriv", "--reuid", user, "--clear-groups", "cat", URL_FILE).returncode != 0


def test_metrics_and_health_are_served_from_within_the_hardened_unit(service: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    service.write(CONFIG, EVERY_SECOND + f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
    service.systemctl("start", UNIT)

    def get(path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    eventually(lambda: get("/ready")[0] == 200)
    assert json.loads(get("/health")[1]) == {"status": "ok", "reasons": []}
    sample = 'catfeeder_cron_job_runs_total{job="clean-tokens",outcome="succeeded"}'
    eventually(lambda: f"{sample} 0.0" not in get("/metrics")[1])


def test_a_reload_takes_over_a_good_configuration_and_refuses_a_bad_one(service: Machine) -> None:
    service.write(CONFIG, EVERY_SECOND)
    service.systemctl("start", UNIT)
    pid = service.show("MainPID")
    service.write(CONFIG, EVERY_SECOND + '[jobs.test-hello-world]\nenabled = true\ninterval = "1s"\n')
    service.systemctl("reload", UNIT)
    assert service.show("ActiveState") == "active"
    assert "(4 scheduled)" in service.show("StatusText")
    eventually(lambda: service.journal("JOB=test-hello-world"))

    service.write(CONFIG, EVERY_SECOND + "nonsense = 1\n")
    service.systemctl("reload", UNIT)
    eventually(lambda: "nonsense" in service.messages("-p", "err"))
    refused = "reload refused, the old configuration stays: "
    eventually(lambda: service.show("StatusText").startswith(refused))
    assert (service.systemctl("is-active", UNIT), service.show("MainPID")) == ("active", pid)
