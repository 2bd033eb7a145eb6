"""What the tests on a real PostgreSQL have in common: connections, and a way to run the clean-up jobs."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings, DatabaseTables
from catfeeder_cron.database import Database, embedded
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.jobs import clean_tokens
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.executor import run_job


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[..., psycopg.Connection]]:
    """Opens further connections of the superuser to the test's database, in autocommit mode."""
    opened: list[psycopg.Connection] = []

    def open_one(url: str = database_url, *, autocommit: bool = True) -> psycopg.Connection:
        opened.append(psycopg.connect(url, autocommit=autocommit))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


@pytest.fixture
def admin(connect: Callable[..., psycopg.Connection]) -> psycopg.Connection:
    """The superuser in the test's database, in autocommit mode."""
    return connect()


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[..., Database]]:
    """Opens a Database with settings of [database]; closed at the end."""
    opened: list[Database] = []

    def open_one(url: str = database_url, **settings: Any) -> Database:
        opened.append(Database(DatabaseSettings.model_validate({"url": url, **settings})))
        return opened[-1]

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[..., Database]) -> Database:
    return open_database()


@pytest.fixture
def clean(database: Database) -> Callable[..., JobReport]:
    """Runs clean-tokens, or another clean-up job, now. Further keywords are options of the job."""

    def run(
        *,
        job: Job[Any] = clean_tokens.JOB,
        database: Database = database,
        tables: dict[str, str] | None = None,
        timeout: float = 300,
        context: dict[str, Any] | None = None,
        **options: Any,
    ) -> JobReport:
        settings = job.settings.model_validate(options)
        given = JobContext(
            database=database,
            tables=DatabaseTables.model_validate(tables or {}),
            timeout=timedelta(seconds=timeout),
            **(context or {}),
        )
        return run_job(job, given, settings)

    return run


@pytest.fixture(scope="session")
def mortal_server(embedded_alone: None) -> Iterator[EmbeddedServer]:
    """A server that tests may stop and start."""
    with embedded.temporary() as server:
        yield server


@pytest.fixture
def stop_server(mortal_server: EmbeddedServer) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Stops the mortal server in one of PostgreSQL's ways ("fast", "immediate"); returns what starts it again."""

    def stop(how: str) -> Callable[[], None]:
        mortal_server._programs.run("pg_ctl", "stop", "-D", "data", "-m", how)
        return mortal_server._launch

    yield stop
    if not mortal_server._is_running():
        mortal_server._launch()
