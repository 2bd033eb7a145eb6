"""The daemon: opens everything, keeps the schedule until a signal asks it to stop, and closes everything."""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from catfeeder_cron import __version__, logs
from catfeeder_cron.background_tasks import BackgroundTasks
from catfeeder_cron.checks import Finding, check, check_callables
from catfeeder_cron.config import Settings
from catfeeder_cron.crons import Crons
from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError
from catfeeder_cron.job import Job
from catfeeder_cron.logs import get_logger
from catfeeder_cron.output import standard_error
from catfeeder_cron.service import ReloadSignal, StopSignals

log = get_logger(__name__)

_LEAVE_SECONDS = 5


def run(
    settings: Settings, read_again: Callable[[], Settings] | None = None, jobs: Mapping[str, Job[Any]] | None = None
) -> None:
    """Run the enabled jobs on their schedule until SIGTERM or SIGINT; call it in the main thread.

    The database may be away at the start and at any time: that is logged once, and the jobs go on when it is back.
    SIGHUP takes over what `read_again` returns, if it is given. A stop lets running jobs end their batch; those that need longer than
    `shutdown_grace` are left behind. Raises CatfeederCronError when a job can't be scheduled.
    """
    with StopSignals() as signals, Database(settings.database) as database:
        tasks = BackgroundTasks(
            blocking=True, max_workers=settings.scheduler.max_workers, timezone=settings.scheduler.timezone
        )

        def log_findings() -> None:
            _log_findings(check(crons.settings, database), signals)

        # In a thread of its own: a callable that hangs while it is imported must not hold up the first heartbeat.
        def begin_to_check() -> None:
            threading.Thread(target=log_findings, name="check", daemon=True).start()

        with Crons(
            config=settings, database=database, background_tasks=tasks, jobs=jobs, on_contact=begin_to_check
        ) as crons:
            if crons.inject_crons() != 0:
                raise CatfeederCronError("not every job could be put on the schedule; see the log")
            with _reloading(crons, read_again, signals):
                log.info("daemon_started", version=__version__, config=str(settings.path), jobs=len(tasks.tasks))
                _keep_the_schedule(tasks, crons, database, signals)
            log.info("daemon_stopped")


def _reloading(
    crons: Crons, read_again: Callable[[], Settings] | None, signals: StopSignals
) -> AbstractContextManager[object]:
    return ReloadSignal(lambda: _reload(crons, read_again, signals)) if read_again else nullcontext()


def _log_findings(findings: Iterable[Finding], signals: StopSignals) -> None:
    for finding in findings:
        if signals.requested.is_set():  # what is being closed now would be found missing
            return
        level = {"ok": log.debug, "warning": log.warning, "error": log.error}[finding.level]
        level("check_finding", subject=finding.subject, message=finding.message)


def _reload(crons: Crons, read_again: Callable[[], Settings], signals: StopSignals) -> None:
    """Take over the configuration as it is now; a faulty one is refused with all its faults, and the old one stays."""
    before = crons.settings
    try:
        settings = read_again()
    except ConfigurationError as error:
        for fault in error.faults:
            log.error("reload_refused", fault=fault)
        return
    try:
        crons.reload(settings)
    except CatfeederCronError as error:
        log.error("reload_incomplete", reason=str(error))
    logs.configure(settings.logging.level, settings.logging.format, standard_error())
    log.info("reloaded", config=str(settings.path), jobs=sum(job.enabled for job in settings.jobs.values()))
    for key in _settled_at_start(before, settings):
        log.warning("restart_needed", key=key)
    if _callables(before) != _callables(settings):
        _log_findings(check_callables(settings), signals)


def _settled_at_start(before: Settings, after: Settings) -> list[str]:
    """Return the changed keys that a running process can't take over."""
    keys = {
        "database": (before.database, after.database, {"tables"}),
        "scheduler": (before.scheduler, after.scheduler, {"timezone", "shutdown_grace"}),
        "metrics": (before.metrics, after.metrics, set[str]()),
    }
    return [
        f"{section}.{field.alias or name}"
        for section, (old, new, applied) in keys.items()
        for name, field in type(new).model_fields.items()
        if name not in applied and getattr(old, name) != getattr(new, name)
    ]


def _callables(settings: Settings) -> list[object]:
    return [settings.actions.handlers, *(getattr(job, "call", None) for job in settings.jobs.values())]


def _keep_the_schedule(tasks: BackgroundTasks, crons: Crons, database: Database, signals: StopSignals) -> None:
    """Block until a stop was asked for and no job is running any more."""
    over = threading.Event()

    def stop() -> None:
        grace = crons.settings.scheduler.shutdown_grace
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
