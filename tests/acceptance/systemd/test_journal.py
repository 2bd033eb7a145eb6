"""What an operator finds in the journal."""

import json

import psycopg
import pytest

from tests.acceptance.systemd.machine import CONFIG, UNIT, URL_FILE, Machine
from tests.support.waiting import eventually

pytestmark = pytest.mark.systemd

JOBS = f'[database]\nurl_file = "{URL_FILE}"\n[jobs.clean-tokens]\ninterval = "1s"\n'


def test_a_run_can_be_found_by_its_fields(service: Machine, app: psycopg.Connection) -> None:
    app.execute(
        'INSERT INTO "Connections" (token, user_id, expiration_date)'
        " SELECT n::text, 1, now() - interval '1 day' FROM generate_series(1, 10) n"
    )
    service.write(CONFIG, JOBS)
    service.systemctl("start", UNIT)
    entry = eventually(lambda: service.journal("JOB=clean-tokens", "EVENT=job_finished"))[0]
    assert entry["MESSAGE"].startswith("job_finished job=clean-tokens run_id=")
    assert {key: entry[key] for key in ("PRIORITY", "OUTCOME", "DELETED", "SYSLOG_IDENTIFIER", "_TRANSPORT")} == {
        "PRIORITY": "6",
        "OUTCOME": "succeeded",
        "DELETED": "10",
        "SYSLOG_IDENTIFIER": "catfeeder-cron",
        "_TRANSPORT": "journal",
    }
    assert float(entry["DURATION"]) > 0
    assert entry["CODE_FILE"].endswith("/catfeeder_cron/scheduler/executor.py")
    assert int(entry["CODE_LINE"]) > 0
    (run_id,), *_ = app.execute(
        "SELECT run_id FROM catfeeder_cron.job_runs WHERE counts ->> 'deleted' = '10'"
    ).fetchall()
    assert entry["RUN_ID"] == str(run_id)
    assert service.messages("-p", "err") == ""


def test_errors_are_errors_and_hold_no_password(service: Machine, app: psycopg.Connection) -> None:
    app.execute('DROP TABLE "Connections"')
    service.write(CONFIG, JOBS)
    service.systemctl("start", UNIT)
    entry = eventually(lambda: service.journal("-p", "err", "JOB=clean-tokens"))[0]
    assert entry["OUTCOME"] == "failed"
    assert 'there is no table "public"."Connections"' in entry["REASON"]
    assert "hunter2" not in json.dumps(service.journal())


def test_a_traceback_is_one_entry_and_one_of_twenty_megabytes_arrives(service: Machine) -> None:
    code = (
        "from catfeeder_cron import logs; logs.configure('info'); log = logs.get_logger('x')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('job_raised', job='traceback')\n"
        "log.info('large', job='large', text='x' * 20_000_000)\n"
    )
    service.write("/run/logs.py", code)
    service.run(
        "systemd-run", "--quiet", "--wait", "--unit=logs-test", "/opt/catfeeder-cron/venv/bin/python", "/run/logs.py"
    )

    def entries(*matches: str) -> list[str]:
        command = ("journalctl", "-u", "logs-test", "-o", "json", "--all", "--no-pager", *matches)
        return service.run(*command).splitlines()

    (line,) = eventually(lambda: entries("JOB=traceback"))
    message = json.loads(line)["MESSAGE"]
    assert message.startswith("job_raised job=traceback\nTraceback (most recent call last):\n")
    assert message.endswith("ZeroDivisionError: division by zero")
    (line,) = eventually(lambda: entries("JOB=large"))
    assert len(line) > 40_000_000


def test_what_a_callable_prints_logs_and_raises_is_found_by_its_job(service: Machine, app: psycopg.Connection) -> None:
    code = (
        "import logging, subprocess\n"
        "def main():\n"
        "    print('printed')\n"
        "    logging.getLogger('feeders').warning('logged')\n"
        "    subprocess.run(['echo', 'started'])\n"
        "    raise ValueError('raised')\n"
        "def stay():\n"
        "    while True: pass\n"
    )
    (folder,) = service.run("sh", "-c", "echo /opt/catfeeder-cron/venv/lib/python3.*/site-packages").split()
    service.write(f"{folder}/feeders.py", code)
    jobs = '[jobs.feed]\ncall = "feeders:main"\ninterval = 1\n[jobs.stay]\ncall = "feeders:stay"\ninterval = 1\n'
    service.write(CONFIG, f'[database]\nurl_file = "{URL_FILE}"\n{jobs}')
    service.systemctl("start", UNIT)
    lines = {"printed", "started"}
    eventually(lambda: lines <= {entry.get("LINE") for entry in service.journal("JOB=feed", "EVENT=job_output")})
    logged = eventually(lambda: service.journal("JOB=feed", "LOGGER=feeders"))[0]
    assert logged["MESSAGE"].startswith("logged job=feed run_id=")
    assert logged["PRIORITY"] == "4"
    raised = eventually(lambda: service.journal("JOB=feed", "EVENT=job_raised"))[0]
    assert raised["MESSAGE"].startswith("job_raised job=feed run_id=")
    assert raised["MESSAGE"].endswith("ValueError: raised")
    assert "in main" in raised["MESSAGE"]
    eventually(lambda: app.execute("SELECT FROM catfeeder_cron.job_runs WHERE job = 'stay'").fetchall())
    service.systemctl("stop", UNIT)
    (ended,) = app.execute(
        "SELECT outcome FROM catfeeder_cron.job_runs WHERE job = 'stay' AND missed IS NULL"
    ).fetchall()
    assert ended == ("aborted",)
    assert "guard.main" not in service.run("ps", "-eo", "args")


def test_a_journal_that_is_stopped_does_not_stop_the_jobs(service: Machine, app: psycopg.Connection) -> None:
    jobs = JOBS + '[jobs.test-hello-world]\nenabled = true\ninterval = "1s"\n'
    service.write(CONFIG, jobs)
    service.systemctl("start", UNIT)
    runs = "SELECT count(*) FROM catfeeder_cron.job_runs WHERE job = 'test-hello-world' AND outcome = 'succeeded'"

    def count() -> int:
        (number,) = app.execute(runs).fetchone() or (0,)
        return int(number)

    eventually(count)
    service.systemctl("kill", "--signal=STOP", "systemd-journald")
    try:
        before = count()
        eventually(lambda: count() >= before + 4)
    finally:
        service.systemctl("kill", "--signal=CONT", "systemd-journald")
    seen = len(service.journal("EVENT=hello_world"))
    eventually(lambda: len(service.journal("EVENT=hello_world")) > seen)
    assert service.show("NRestarts") == "0"


def test_lines_before_the_configuration_is_read_have_their_priority(service: Machine) -> None:
    with pytest.raises(AssertionError):
        service.run(
            "systemd-run", "--quiet", "--wait", "--unit=bad-usage", "catfeeder-cron", "--config", "/nowhere", "start"
        )
    command = ("journalctl", "-u", "bad-usage", "-p", "err", "-o", "cat", "--no-pager")
    said = eventually(lambda: service.run(*command))
    assert "catfeeder-cron: /nowhere: no such file" in said


def test_the_journal_says_when_the_daemon_starts_and_stops(service: Machine) -> None:
    service.systemctl("start", UNIT)
    service.systemctl("stop", UNIT)
    events = eventually(lambda: [entry.get("EVENT") for entry in service.journal("EVENT=daemon_stopped")])
    assert events == ["daemon_stopped"]
    assert len(service.journal("EVENT=daemon_started")) == 1
