"""The daemon: opens everything, keeps the schedule until a signal asks it to stop, and closes everything."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta

from catfeeder_cron import __version__, logs
from catfeeder_cron.background_tasks import BackgroundTasks
from catfeeder_cron.checks import check
from catfeeder_cron.config import Settings
from catfeeder_cron.crons import Crons
from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError
from catfeeder_cron.logs import get_logger
from catfeeder_cron.service import ReloadSignal, StopSignals

log = get_logger(__name__)


def run(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Run the enabled jobs on their schedule until SIGTERM or SIGINT; call it in the main thread.

    The database may be away at the start and at any time: that is logged once, and the jobs go on when it is back.
    SIGHUP takes over what `read_again` returns. A stop lets running jobs end their batch; those that need longer than
    `shutdown_grace` are left behind. Raises CatfeederCronError when a job can't be scheduled.
    """
    with StopSignals() as signals, Database(settings.database) as database:
        tasks = BackgroundTasks(
            blocking=True, max_workers=settings.scheduler.max_workers, timezone=settings.scheduler.timezone
        )

        def log_findings() -> None:
            for finding in check(crons.settings, database):
                level = {"ok": log.debug, "warning": log.warning, "error": log.error}[finding.level]
                level("check_finding", subject=finding.subject, message=finding.message)

        with Crons(config=settings, database=database, background_tasks=tasks, on_contact=log_findings) as crons:
            if crons.inject_crons() != 0:
                raise CatfeederCronError("not every job could be put on the schedule; see the log")
            log.info("daemon_started", version=__version__, config=str(settings.path), jobs=len(tasks.tasks))
            with ReloadSignal(lambda: _reload(crons, read_again)):
                _keep_the_schedule(tasks, crons, signals, settings.scheduler.shutdown_grace)
            log.info("daemon_stopped")


def _reload(crons: Crons, read_again: Callable[[], Settings]) -> None:
    """Take over the configuration as it is now; a faulty one is refused with all its faults, and the old one stays."""
    before = crons.settings
    try:
        settings = read_again()
    except ConfigurationError as error:
        for fault in error.faults:
            log.error("reload_refused", fault=fault)
        return
    crons.reload(settings)
    logs.configure(settings.logging.level, settings.logging.format)
    log.info("reloaded", config=str(settings.path), jobs=sum(job.enabled for job in settings.jobs.values()))
    for section in ("database", "scheduler", "metrics"):
        if getattr(before, section) != getattr(settings, section):
            log.warning("restart_needed", section=section)


def _keep_the_schedule(tasks: BackgroundTasks, crons: Crons, signals: StopSignals, grace: timedelta) -> None:
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
            crons.close(abandoned=f"still running {grace.total_seconds():g} s after the stop")
            os._exit(0)

    signals.on_request(stop)
    if not signals.requested.is_set():
        tasks.start()
    crons.wait()
    over.set()
