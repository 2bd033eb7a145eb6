"""How fast actions that take no time are done, beside Procrastinate's tasks; whether future ones slow the others."""

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from statistics import median

import procrastinate
import psycopg

from catfeeder_cron.config import ActionsSettings, DatabaseSettings, DatabaseTables
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.indexes import create_indexes
from catfeeder_cron.job import JobContext, Resources
from catfeeder_cron.jobs import check_actions
from catfeeder_cron.scheduler.executor import run_job
from tests.benchmarks.report import Figure, milliseconds
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

_ROUNDS = 3
_EACH = 3000
_CONCURRENCY = 8
_FUTURE = 1_000_000
_LOOKS = 9

_INSERT = """INSERT INTO "Actions" (kind, due_at) SELECT 'noop', now() + %s FROM generate_series(1, %s)"""


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    with sessions.copy(scale.small, indexed=True) as url:
        ours, theirs = [], []
        for _ in range(_ROUNDS):
            theirs.append(_EACH / asyncio.run(_procrastinate(url)))
            _insert(url, timedelta(0), _EACH)
            ours.append(_EACH / _run(url, _EACH))
        ratio = median(ours) / median(theirs)
        yield Figure(
            f"actions that do nothing, {_CONCURRENCY} at a time, each in its handler's process",
            f"Procrastinate {procrastinate.__version__}: {median(theirs):,.0f} tasks/s in its own",
            f"{ratio:.2f} of that ({median(ours):,.0f}/s)",
            "at least 0.50",
            ratio >= 0.5,
        )
    with sessions.copy(scale.small, indexed=True) as url:
        without = _looks(url)
        _insert(url, timedelta(days=30), _FUTURE)
        with_them = _looks(url)
        ratio = median(with_them) / median(without)
        yield Figure(
            f"a check for one due action beside {_FUTURE:,} future ones",
            f"without those: {milliseconds(median(without))}",
            f"{ratio:.2f} times that ({milliseconds(median(with_them))})",
            "at most 1.50",
            ratio <= 1.5,
        )


async def _procrastinate(url: str) -> float:
    """Return how long its worker takes for tasks that do nothing."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))

    @app.task(name="noop")
    async def noop() -> None:
        pass

    async with app.open_async():
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        await noop.batch_defer_async(*[{} for _ in range(_EACH)])
        begun = time.perf_counter()
        await app.run_worker_async(
            concurrency=_CONCURRENCY, wait=False, install_signal_handlers=False, listen_notify=False
        )
        return time.perf_counter() - begun


def _looks(url: str) -> list[float]:
    _insert(url, timedelta(0), 1)
    _run(url, 1)
    durations = []
    for _ in range(_LOOKS):
        _insert(url, timedelta(0), 1)
        durations.append(_run(url, 1))
    return durations


def _insert(url: str, later: timedelta, number: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_INSERT, [later, number])
        connection.execute('VACUUM ANALYZE "Actions"')


def _run(url: str, due: int) -> float:
    """Return how long check-actions takes for this many actions, in seconds."""
    settings = DatabaseSettings.model_validate({"url": url})
    with Database(settings) as database:
        list(schema.upgrade(database))
        list(create_indexes(database, DatabaseTables(), check_actions.JOB.wanted_indexes))
        context = JobContext(
            database=database,
            tables=settings.tables,
            timeout=timedelta(seconds=600),
            resources=Resources(
                actions=ActionsSettings.model_validate({"noop": {"call": "tests.benchmarks.noop:noop"}})
            ),
        )
        options = check_actions.CheckActions(concurrency=_CONCURRENCY)
        report = run_job(check_actions.JOB, context, options)
    assert report.counts["done"] == due, report
    return report.duration.total_seconds()
