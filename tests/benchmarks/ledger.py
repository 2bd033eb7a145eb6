"""What the schedule and the ledger cost: statements for a slot, a daemon that idles, how late jobs start."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import psycopg
from apscheduler.schedulers.background import BackgroundScheduler
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from catfeeder_cron.config import JobSettings
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.schedule import IntervalSchedule
from catfeeder_cron.scheduler.crons import Crons
from tests.benchmarks.report import Figure, milliseconds, percentile
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

_SECOND = timedelta(seconds=1)
_JOBS = 50
_RUN_SECONDS = 60
_START_SECONDS = 12
_IDLE_SECONDS = 80
_HOUR = 3600

_MOST_STATEMENTS_PER_SLOT = 4
_MOST_CPU_SECONDS = 2
_MOST_STATEMENTS_PER_HOUR = 1000
_MOST_MEGABYTES = 60
_MOST_DELAY = 0.025

_HEARTBEAT = "INSERT INTO catfeeder_cron.daemons"


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    with sessions.copy(scale.small, indexed=True) as url, tempfile.TemporaryDirectory() as folder:
        yield _statements_per_slot(url, Path(folder))
        yield from _idling(url, Path(folder))
        yield _delays(url, Path(folder))


def _statements_per_slot(url: str, folder: Path) -> Figure:
    slots = 10
    enough = threading.Semaphore(0)
    with _logged(url) as text, _crons(url, folder, {"job": enough.release}) as crons:
        crons.inject_crons()
        for _ in range(2):
            enough.acquire()
        time.sleep(0.2)
        text()  # what belongs to the start
        for _ in range(slots):
            enough.acquire()
        time.sleep(0.2)
        lines = [line for line in _statements(text()) if _HEARTBEAT not in line]
    per_slot = len(lines) / slots
    return Figure(
        "statements to claim and to record a slot",
        "-",
        f"{per_slot:.1f}",
        f"at most {_MOST_STATEMENTS_PER_SLOT}",
        per_slot <= _MOST_STATEMENTS_PER_SLOT,
    )


def _idling(url: str, folder: Path) -> Iterator[Figure]:
    """Extrapolate a daemon with the default jobs, after its start, to an hour."""
    config = _written(folder, url, "")
    command = [sys.executable, "-m", "catfeeder_cron", "--config", str(config), "start"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with _logged(url) as text, subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        time.sleep(_START_SECONDS)
        text()
        before = _cpu_seconds(process.pid)
        time.sleep(_IDLE_SECONDS)
        cpu = (_cpu_seconds(process.pid) - before) * _HOUR / _IDLE_SECONDS
        statements = len(_statements(text())) * _HOUR / _IDLE_SECONDS
        megabytes = _resident_megabytes(process.pid)
        process.send_signal(signal.SIGTERM)
    over = f"an idle daemon for an hour (extrapolated from {_IDLE_SECONDS} s)"
    yield Figure(f"{over}: CPU", "-", f"{cpu:.1f} s", f"at most {_MOST_CPU_SECONDS} s", cpu <= _MOST_CPU_SECONDS)
    yield Figure(
        f"{over}: statements",
        "-",
        f"{statements:.0f}",
        f"at most {_MOST_STATEMENTS_PER_HOUR:,}",
        statements <= _MOST_STATEMENTS_PER_HOUR,
    )
    yield Figure(
        "an idle daemon: resident memory",
        "-",
        f"{megabytes:.0f} MB",
        f"at most {_MOST_MEGABYTES} MB",
        megabytes <= _MOST_MEGABYTES,
    )


def _delays(url: str, folder: Path) -> Figure:
    schedules = {f"job-{number}": IntervalSchedule(_SECOND, f"job-{number}") for number in range(_JOBS)}
    plain, ours = (way(url, folder, schedules) for way in (_delays_of_apscheduler, _delays_of_crons))
    told = [
        f"{milliseconds(median(each))} (99 in 100 within {milliseconds(percentile(each, 0.99))})"
        for each in (plain, ours)
    ]
    return Figure(
        f"start after the slot, {_JOBS} jobs every second for {_RUN_SECONDS} s",
        f"APScheduler alone: {told[0]}",
        told[1],
        f"at most {milliseconds(_MOST_DELAY)}",
        median(ours) <= _MOST_DELAY and len(ours) >= _JOBS * (_RUN_SECONDS - 3),
    )


def _delays_of_crons(url: str, folder: Path, schedules: dict[str, IntervalSchedule]) -> list[float]:
    delays: list[float] = []
    with _crons(url, folder, _watches(schedules, delays)) as crons:
        crons.inject_crons()
        time.sleep(_RUN_SECONDS)
    return delays


def _delays_of_apscheduler(_url: str, _folder: Path, schedules: dict[str, IntervalSchedule]) -> list[float]:
    delays: list[float] = []
    scheduler = BackgroundScheduler(timezone="UTC")
    for job_id, watch in _watches(schedules, delays).items():
        first = schedules[job_id].next_after(datetime.now(UTC) + _SECOND)
        scheduler.add_job(watch, "interval", seconds=1, start_date=first)
    scheduler.start()
    time.sleep(_RUN_SECONDS)
    scheduler.shutdown()
    return delays


def _watches(schedules: dict[str, IntervalSchedule], delays: list[float]) -> dict[str, Callable[[], None]]:
    """Return a function for each job that writes down how long ago its slot was."""

    def watch(schedule: IntervalSchedule) -> Callable[[], None]:
        def run() -> None:
            now = datetime.now(UTC)
            slots = schedule.between(now - _SECOND, now)
            assert slots
            delays.append((now - slots.last).total_seconds())

        return run

    return {job_id: watch(schedule) for job_id, schedule in schedules.items()}


def _crons(url: str, folder: Path, functions: dict[str, Callable[[], None]]) -> Crons:
    def job(job_id: str, function: Callable[[], None]) -> Job[JobSettings]:
        def run(_context: JobContext, _settings: JobSettings) -> None:
            function()

        return Job(id=job_id, summary=job_id, settings=JobSettings, run=run)

    tables = "\n".join(f"[jobs.{job_id}]\ninterval = 1" for job_id in functions)
    jobs = {job_id: job(job_id, function) for job_id, function in functions.items()}
    return Crons(config=_written(folder, url, tables), jobs=jobs)


def _written(folder: Path, url: str, tables: str) -> Path:
    config = folder / "config.toml"
    config.write_text(f'[database]\nurl = "{url}"\n{tables}\n')
    config.chmod(0o600)
    return config


@contextmanager
def _logged(url: str) -> Iterator[Callable[[], str]]:
    """Have the server log every statement in this database; yield what returns the log since it was last asked."""
    parts = conninfo_to_dict(url)
    database = sql.Identifier(str(parts["dbname"]))
    log = (Path(str(parts["host"])).parent / "log").open(errors="replace")
    with log, psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET log_statement = 'all'").format(database))
        log.read()
        yield log.read
        connection.execute(sql.SQL("ALTER DATABASE {} RESET log_statement").format(database))


def _statements(text: str) -> list[str]:
    """Return the statements of a server's log, each as one line."""
    joined = re.sub(r"\n\t\s*", " ", text)
    return [line for line in joined.splitlines() if re.search(r"LOG:  (statement|execute [^:]*):", line)]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_megabytes(pid: int) -> float:
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) / 1024
