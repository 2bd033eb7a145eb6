"""Jobs that only exist in config.toml: one SQL statement, or one Python callable."""

import asyncio
import inspect
from copy import deepcopy
from datetime import timedelta
from threading import current_thread, main_thread
from typing import Any

from catfeeder_cron.callables import find_callable
from catfeeder_cron.config import CustomJobSettings
from catfeeder_cron.database import RollBack
from catfeeder_cron.errors import CatfeederCronError, DatabaseError, JobSkipped
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.logs import one_line
from catfeeder_cron.output import captured_output

# How often a coroutine's run looks whether it was asked to stop, and how long it may take to clean up before it is
# cancelled once more.
_LOOK_SECONDS = 0.2
_CLEAN_UP_SECONDS = 3


def custom_job(job_id: str, settings: CustomJobSettings) -> Job[CustomJobSettings]:
    """Return the job that a [jobs.ID] table describes."""
    if settings.sql is not None:
        return Job(job_id, "a statement of SQL", CustomJobSettings, _run_sql)
    return Job(job_id, f"call {settings.call}", CustomJobSettings, _run_callable)


def _run_sql(context: JobContext, settings: CustomJobSettings) -> None:
    assert settings.sql is not None
    try:
        with context.transaction() as connection:
            # In the binary format libpq's extended protocol is used, which takes one statement and no more.
            cursor = connection.execute(settings.sql.encode(), binary=True)
            context.counts["rows"] = max(0, cursor.rowcount)
            if context.dry_run:
                raise RollBack
    except DatabaseError:
        context.counts.clear()  # a transaction that fails as late as at its COMMIT has changed nothing
        raise


def _run_callable(context: JobContext, settings: CustomJobSettings) -> None:
    assert settings.call is not None
    with captured_output(), context.as_current():
        function = find_callable(settings.call)
        if context.dry_run:
            raise JobSkipped("a Python callable can't tell what it would do")
        try:
            # Copies: what a run does to its arguments is not for the next one to see.
            _finish(function(*deepcopy(settings.args), **deepcopy(settings.kwargs)), context)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise CatfeederCronError(one_line(f"it ended with exit status {end.code}")) from None
        except asyncio.CancelledError:
            context.raise_if_over()
            raise CatfeederCronError("it was cancelled, though nobody asked it to stop") from None
        except KeyboardInterrupt:
            if current_thread() is main_thread():
                raise
            raise CatfeederCronError("it raised KeyboardInterrupt") from None
    # One that never looked whether it should stop has done all of its work.
    if context.stop_was_seen or context.overdue() >= timedelta(0):
        context.raise_if_over()


def _finish(result: object, context: JobContext) -> None:
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result, context))
    elif inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise CatfeederCronError("it is a generator function, so calling it does nothing; expected no `yield` in it")


async def _awaited(result: Any, context: JobContext) -> None:
    """Await what an async function gave, and cancel it when the run is asked to stop."""
    task = asyncio.ensure_future(result)
    while not (await asyncio.wait([task], timeout=_LOOK_SECONDS))[0]:
        if context.stopping:
            # One that resists is asked again and again; the supervisor tells of it.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_CLEAN_UP_SECONDS)
    await task
