"""The daemon: it opens all parts, runs the schedule until a signal asks it to stop, and closes all parts."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError
from catfeeder_cron.imports import load
from catfeeder_cron.job import Job
from catfeeder_cron.logs import get_logger, prepare
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.crons import Crons
from catfeeder_cron.scheduler.listeners import RunListener
from catfeeder_cron.service.health import Health
from catfeeder_cron.service.orphans import reap_orphans_as_init
from catfeeder_cron.service.reload import CheckAtFirstBeat, reload
from catfeeder_cron.service.sd_notify import Notifier
from catfeeder_cron.service.signals import ReloadSignal, StopSignals
from catfeeder_cron.service.status import StatusReporter
from catfeeder_cron.version import __version__

log = get_logger("catfeeder_cron.service")

_LEAVE_SECONDS = 5
_TURN_EVERY = timedelta(seconds=60)
_EXTEND_EVERY_SECONDS = 2


def run(
    settings: Settings, read_again: Callable[[], Settings] | None = None, jobs: Mapping[str, Job[Any]] | None = None
) -> None:
    """Run the enabled jobs on their schedule until SIGTERM or SIGINT; call it in the main thread.

    The database may be away at the start and at any time: an outage is logged once, and the jobs go on when it is over.
    SIGHUP applies the settings that `read_again`, if given, returns. A stop lets running jobs end their batch and
    abandons those that need longer than `shutdown_grace`. Raises CatfeederCronError when a job can't be scheduled.
    """
    prepare()
    reap_orphans_as_init()
    notifier = Notifier()
    # Every turn of the scheduler's loop feeds the watchdog, so the loop must not sleep longer than that needs.
    turn_every = min(_TURN_EVERY, notifier.watchdog / 3) if notifier.watchdog else _TURN_EVERY
    with StopSignals() as signals, Database(settings.database) as database, ExitStack() as closing:
        tasks = BackgroundTasks(
            blocking=True,
            max_workers=settings.scheduler.max_workers,
            timezone=settings.scheduler.timezone,
            turn_every_seconds=turn_every.total_seconds(),
        )
        with Crons(config=settings, database=database, background_tasks=tasks, jobs=jobs) as crons:
            health = Health(crons, database, turn_every)
            reporter = StatusReporter(notifier, health)
            tasks.on_turn(reporter.turned)
            crons.listen(reporter)
            crons.listen(CheckAtFirstBeat(crons, database, signals))
            if settings.metrics.listen:
                crons.listen(closing.enter_context(_serve(settings.metrics.listen, crons, database, health)))
            if crons.inject_crons() != 0:
                raise CatfeederCronError("not every job could be put on the schedule; see the log")
            with ExitStack() as serving:
                if read_again:
                    take_over = partial(reload, crons, settings, read_again, signals)
                    serving.enter_context(ReloadSignal(partial(reporter.reload, take_over)))
                log.info("daemon_started", version=__version__, config=str(settings.path), jobs=len(tasks.tasks))
                _keep_the_schedule(tasks, crons, database, reporter, signals)
            log.info("daemon_stopped")


@contextmanager
def _serve(address: str, crons: Crons, database: Database, health: Health) -> Iterator[RunListener]:
    """Serve metrics and health; yield the listener that counts runs. A busy address is logged, and the daemon runs."""
    load("catfeeder_cron.service.endpoints", "catfeeder_cron.service.metrics")
    from catfeeder_cron.service.endpoints import Endpoints
    from catfeeder_cron.service.metrics import Metrics

    metrics = Metrics(crons, database, health)
    endpoints = Endpoints(address, {"/metrics": metrics.page, "/health": metrics.health, "/ready": metrics.ready})
    try:
        endpoints.open()
        log.info("metrics_served", listen=address, port=endpoints.port)
    except OSError as error:
        log.error("metrics_not_served", listen=address, reason=error.strerror or str(error))
    try:
        yield metrics
    finally:
        endpoints.close()


def _keep_the_schedule(
    tasks: BackgroundTasks, crons: Crons, database: Database, reporter: StatusReporter, signals: StopSignals
) -> None:
    """Block until a stop was requested and no job is running any more.

    `stop` runs in a thread of StopSignals; the main thread waits in `start` and `crons.wait` and then sets `over`.
    """
    over = threading.Event()

    def stop() -> None:
        grace = crons.settings.scheduler.shutdown_grace
        log.info("daemon_stopping", running=crons.running, shutdown_grace_seconds=grace.total_seconds())
        reporter.stopping()
        crons.request_stop()
        # The signal may have come before the scheduler was started: then wait for its start, and stop it.
        while not tasks.running and not over.wait(0.01):
            pass
        tasks.safe_stop(wait=False)
        until = time.monotonic() + grace.total_seconds()
        while not over.wait(max(0, min(_EXTEND_EVERY_SECONDS, until - time.monotonic()))):
            reporter.still_stopping()
            if time.monotonic() >= until:
                log.error("shutdown_grace_is_over", abandoned=crons.running)
                # In a thread, because closing may wait for the database, for which the jobs may be waiting, too.
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
