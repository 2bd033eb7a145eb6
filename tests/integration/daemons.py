"""What the tests of the ledger and of those who use it have in common."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from catfeeder_cron.config import DatabaseTables, JobSettings
from catfeeder_cron.database import Database
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.report import JobReport
from catfeeder_cron.schedule import IntervalSchedule
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.crons import Crons
from tests.support.waiting import eventually

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)

CONFIG = """
[database]
url = "{url}"
connect_timeout = 2

[scheduler]
max_workers = {max_workers}

"""

wait_for = eventually


def rows(admin: psycopg.Connection, columns: str, where: str = "true") -> list[tuple[Any, ...]]:
    query = f"SELECT {columns} FROM catfeeder_cron.job_runs WHERE {where} ORDER BY slot, run_id"
    return admin.execute(query.encode()).fetchall()


def context(database: Database, timeout: float = 300) -> JobContext:
    return JobContext(database=database, tables=DatabaseTables(), timeout=timedelta(seconds=timeout))


def report(outcome: Any = "succeeded", reason: str | None = None, job: str = "job") -> JobReport:
    return JobReport(job, outcome, reason, {}, datetime.now(UTC), timedelta(0), dry_run=False)


class Work:
    """A job that lasts until it is released, and knows how often it ran, alone or not."""

    def __init__(
        self, job_id: str = "work", *, shared: bool = False, released: bool = True, obeys: bool = True
    ) -> None:
        self.runs = 0
        self.at_once = 0
        self.most_at_once = 0
        self.released = threading.Event()
        if released:
            self.released.set()
        self._obeys = obeys
        self._lock = threading.Lock()
        self.job = Job(id=job_id, summary="work", settings=JobSettings, run=self._run, shared=shared)

    def _run(self, context: JobContext, _settings: JobSettings) -> None:
        with self._lock:
            self.runs += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            while not self.released.wait(0.01):
                if self._obeys:
                    context.checkpoint()
        finally:
            with self._lock:
                self.at_once -= 1


def quiet_interval(about_seconds: int, job_id: str = "work") -> int:
    """Return an interval of about so many seconds, whose slots are minutes away from now."""
    now, margin = datetime.now(UTC), timedelta(minutes=5)
    for seconds in range(about_seconds, about_seconds + 600):
        interval = timedelta(seconds=seconds)
        if margin < IntervalSchedule(interval, job_id).next_after(now) - now < interval - margin:
            return seconds
    raise AssertionError("ten minutes of intervals have a slot now")


class Office:
    """Makes Crons objects on one database, each a process of its own to the others, and closes them at the end."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._opened: list[tuple[Crons, Work]] = []
        self._hourly = quiet_interval(3600)
        self.trigger = IntervalSchedule(timedelta(seconds=self._hourly), "work").describe()

    def open(self, work: Work, *, max_workers: int = 4, **options: Any) -> Crons:
        """Open one whose only job is `work`, about every hour, at no time near, unless the options say otherwise."""
        lines = {"interval": self._hourly, **options}
        table = "\n".join(f"{key} = {str(value).lower()}" for key, value in lines.items())
        config = self._folder / f"config-{len(self._opened)}.toml"
        config.write_text(
            CONFIG.format(url=self._url, max_workers=max_workers) + f"[jobs.{work.job.id}]\n{table}\n", "utf-8"
        )
        config.chmod(0o600)
        crons = Crons(config=config, jobs={work.job.id: work.job})
        self._opened.append((crons, work))
        return crons

    def close(self) -> None:
        for crons, work in self._opened:
            work.released.set()
            crons.close()


def heart(crons: Crons) -> None:
    """Have it beat now."""
    crons._open().supervisor.beat()


def has_account(crons: Crons, job_id: str = "work") -> bool:
    """Whether it knows how far the job's slots are accounted for."""
    return crons._open().job_scheduler._slots[job_id].accounted_until is not None


def tasks_of(crons: Crons) -> BackgroundTasks:
    return crons._open().tasks
