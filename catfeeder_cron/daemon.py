"""The daemon: opens everything, keeps the schedule until a signal asks it to stop, and closes everything."""

import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from catfeeder_cron import __version__
from catfeeder_cron.background_tasks import BackgroundTasks
from catfeeder_cron.config import Settings
from catfeeder_cron.crons import Crons
from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError
from catfeeder_cron.job import Job
from catfeeder_cron.logs import get_logger
from catfeeder_cron.service import StopSignals

log = get_logger(__name__)

_LEAVE_SECONDS = 5


def run(settings: Settings, jobs: Mapping[str, Job[Any]] | None = None) -> None:
    """Run the enabled jobs on their schedule until SIGTERM or SIGINT; call it in the main thread.

    The database may be away at the start and at any time: that is logged once, and the jobs go on when it is back.
    A stop lets running jobs end their batch; those that need longer than `shutdown_grace` are left behind.
    Raises CatfeederCronError when a job can't be scheduled.
    """
    with StopSignals() as signals, Database(settings.database) as database:
        tasks = BackgroundTasks(
            blocking=True, max_workers=settings.scheduler.max_workers, timezone=settings.scheduler.timezone
        )
        with Crons(config=settings, database=database, background_tasks=tasks, jobs=jobs) as crons:
            if crons.inject_crons() != 0:
                raise CatfeederCronError("not every job could be put on the schedule; see the log")
            log.info("daemon_started", version=__version__, config=str(settings.path), jobs=len(tasks.tasks))
            _keep_the_schedule(tasks, crons, database, signals, settings.scheduler.shutdown_grace)
            log.info("daemon_stopped")


def _keep_the_schedule(
    tasks: BackgroundTasks, crons: Crons, database: Database, signals: StopSignals, grace: timedelta
) -> None:
    """Block until a stop was asked for and no job is running any more."""
    over = threading.Event()

    def stop() -> None:
        log.info("daemon_stopping", running=crons.running, shutdown_grace_seconds=grace.total_seconds())
        crons.request_stop()
        # The signal may have come before the scheduler was started: then it is stopped as soon as it is.
        while not tasks.running and not over.wait(0.01):
            pass
        tasks.safe_stop(wait=False)
        if not over.wait(grace.total_seconds()):
            log.error("shutdown_grace_is_over", abandoned=crons.running)
            # In a thread: the database may be what the jobs hang on.
            leave = threading.Thread(target=_leave, args=(crons, database, grace), name="leave", daemon=True)
            leave.start()
            leave.join(_LEAVE_SECONDS)
            os._exit(0)

    signals.on_request(stop)
    if not signals.requested.is_set():
        tasks.start()
    crons.wait()
    over.set()


def _leave(crons: Crons, database: Database, grace: timedelta) -> None:
    crons.close(abandoned=f"still running {grace.total_seconds():g} s after the stop")
    database.close()
