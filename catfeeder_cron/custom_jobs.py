"""Jobs that only exist in config.toml: one SQL statement, or one Python callable."""

import asyncio
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from catfeeder_cron.config import CustomJobSettings
from catfeeder_cron.errors import ConfigurationError, JobSkipped
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.output import captured_output

# How often a coroutine's run looks whether it was asked to stop.
_LOOK_SECONDS = 0.2


def custom_job(job_id: str, settings: CustomJobSettings) -> Job[CustomJobSettings]:
    """Return the job that a [jobs.ID] table describes."""
    if settings.sql is not None:
        return Job(job_id, f"SQL: {settings.sql}", CustomJobSettings, _run_sql)
    return Job(job_id, f"Python: {settings.call}", CustomJobSettings, _run_callable)


def find_callable(reference: str) -> Callable[..., Any]:
    """Import "package.module:function". Raises ConfigurationError where that can't be done, in one line."""
    module_name, _, path = reference.partition(":")
    try:
        found: Any = import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise ConfigurationError(f'"{reference}" can\'t be imported: {type(error).__name__}: {error}') from error
    if not callable(found):
        raise ConfigurationError(f'"{reference}" is {type(found).__name__}, expected something callable')
    return found  # type: ignore[no-any-return]


class _RollBack(Exception):
    pass


def _run_sql(context: JobContext, settings: CustomJobSettings) -> None:
    assert settings.sql is not None
    try:
        with context.transaction() as connection:
            # In the binary format libpq's extended protocol is used, which takes one statement and no more.
            cursor = connection.execute(settings.sql.encode(), binary=True)
            context.counts["rows"] = max(0, cursor.rowcount)
            if context.dry_run:
                raise _RollBack
    except _RollBack:
        pass


def _run_callable(context: JobContext, settings: CustomJobSettings) -> None:
    assert settings.call is not None
    function = find_callable(settings.call)
    if context.dry_run:
        raise JobSkipped("a Python callable can't tell what it would do")
    with captured_output(), context.as_current():
        result = function(*settings.args, **settings.kwargs)
        if inspect.isawaitable(result):
            asyncio.run(_awaited(result, context))
    context.checkpoint()


async def _awaited(result: Any, context: JobContext) -> None:
    """Await what an async function gave, and cancel it when the run is asked to stop."""
    task = asyncio.ensure_future(result)
    while not (await asyncio.wait([task], timeout=_LOOK_SECONDS))[0]:
        if context.stopping:
            task.cancel()
            await asyncio.wait([task])
            context.checkpoint()
    await task
