"""Makes one run of a configured job in this process, and reports how it ended.

No other module decides which outcome an error of a job leads to.
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from catfeeder_cron import logs
from catfeeder_cron.children.pool import Children
from catfeeder_cron.config import CustomJobSettings, JobSettings, Settings
from catfeeder_cron.database import Database
from catfeeder_cron.database.requirements import require_tables
from catfeeder_cron.errors import (
    CatfeederCronError,
    DatabaseError,
    DatabaseUnavailable,
    JobAborted,
    JobInterrupted,
    JobSkipped,
    JobTimedOut,
    SchemaProblem,
    UnknownJob,
)
from catfeeder_cron.job import Job, JobContext, Resources
from catfeeder_cron.ledger import Retries, Trigger
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.report import JobReport, Outcome, Progress, no_progress
from catfeeder_cron.run_control import is_for_the_program
from catfeeder_cron.scheduler.listeners import Origin, Run
from catfeeder_cron.scheduler.supervisor import Supervisor

log = get_logger("catfeeder_cron.runs")
# A logger of its own, so that a command that prints the result can silence it.
log_of_results = get_logger("catfeeder_cron.results")
log_of_slots = get_logger("catfeeder_cron.scheduler")


class Executor:
    """Runs the jobs of the configuration that is in force. All methods may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        jobs: Mapping[str, Job[Any]],
        database: Database,
        supervisor: Supervisor,
        oauth: OAuthClient | None = None,
    ) -> None:
        # Replaced as a whole: a thread that reads it while another takes over a configuration gets one or the other.
        self._in_force = settings, jobs
        self._database = database
        self._supervisor = supervisor
        self._owns_oauth = oauth is None
        self._oauth = oauth or OAuthClient(settings.oauth)
        self._children = Children()
        self._skipped: dict[str, str | None] = {}

    @property
    def settings(self) -> Settings:
        """The configuration that is in force."""
        return self._in_force[0]

    @property
    def stopping(self) -> bool:
        """Whether no run may begin any more."""
        return self._supervisor.runs.stop_reason is not None

    def take_over(self, settings: Settings, jobs: Mapping[str, Job[Any]]) -> None:
        """Put another configuration in force, with all its jobs. An OAuth client that was handed in stays."""
        if self._owns_oauth and settings.oauth != self.settings.oauth:
            self._oauth = OAuthClient(settings.oauth)
        self._in_force = settings, jobs
        self._children.retire()  # the modules that they have imported may have changed

    def find(self, job_id: str) -> tuple[Job[Any], JobSettings]:
        """Return a job and its settings. Raises UnknownJob, which names the nearest id."""
        settings, jobs = self._in_force
        job_settings = settings.require_job(job_id)
        return jobs[job_id], job_settings

    def context(self, job_id: str, progress: Progress = no_progress, slot: datetime | None = None) -> JobContext:
        """Return the context of a run of a job, for its `slot` or for none. Raises UnknownJob."""
        settings = self.settings
        return JobContext(
            database=self._database,
            tables=settings.database.tables,
            timeout=settings.require_job(job_id).timeout,
            progress=progress,
            schedule=settings.schedule(job_id),
            slot=slot,
            resources=Resources(oauth=self._oauth, children=self._children, actions=settings.actions),
        )

    def run(
        self,
        job_id: str,
        claim: Callable[[], int | None],
        trigger: Trigger = "manual",
        progress: Progress = no_progress,
        slot: datetime | None = None,
    ) -> JobReport | None:
        """Make the run that `claim` gets, in this thread, and return its report; None when it gets none.

        Raises UnknownJob and the errors of Supervisor.begin and of `claim`.
        """
        job, settings = self.find(job_id)
        context = self.context(job_id, progress, slot)
        run = self._supervisor.begin(job_id, settings, context, claim, Origin(slot, trigger, job.shared))
        if run is None:
            return None
        try:
            return self._work(run, job, context)
        except BaseException as error:
            # The run must not stay open, whatever was raised and wherever. A run that has ended is not changed.
            self._supervisor.end(run, broken_off(job, context, error, run.run_id))
            raise

    def run_scheduled(
        self, job_id: str, claim: Callable[[], int | None], trigger: Trigger, slot: datetime | None = None
    ) -> JobReport | None:
        """Do as `run`, but log an error that prevents the run, and return None."""
        try:
            return self.run(job_id, claim, trigger, slot=slot)
        except UnknownJob:
            return None  # a reload has removed it at this moment
        except (DatabaseUnavailable, JobInterrupted):
            return None  # logged already; the slot is accounted for when the database, or a daemon, is back
        except CatfeederCronError as error:
            log_of_slots.error("slot_not_claimed", job=job_id, reason=str(error))
            return None

    def dry_run(self, job_id: str, progress: Progress = no_progress) -> JobReport:
        """Have a job count what it would do, without a claim or a trace in the ledger. Raises UnknownJob."""
        job, settings = self.find(job_id)
        context = self.context(job_id, progress)
        context.dry_run = True
        return run_job(job, context, settings)

    def explain(self, job_id: str, problem: CatfeederCronError) -> str:
        """Return why a job failed: the message of `check` if its tables are not as it needs them, else the problem's.

        Raises UnknownJob.
        """
        try:
            with self._database.transaction() as connection:
                require_tables(connection, self.settings.database.tables, job_id, self.find(job_id)[0].tables)
        except SchemaProblem as found:
            return str(found)
        except (DatabaseError, JobSkipped):
            pass
        return str(problem)

    def close(self, abandoned: str | None = None) -> None:
        """Wait for the runs to end; with `abandoned` record them instead, as aborted for this reason. Idempotent."""
        if abandoned is None:
            self._supervisor.runs.wait()
        self._supervisor.close(abandoned)
        self._children.close()

    def _retries(self, job_id: str, settings: JobSettings) -> Retries | None:
        if not isinstance(settings, CustomJobSettings) or not settings.retries:
            return None
        try:
            before = self.settings.schedule(job_id).next_after(self._supervisor.clock.now())
        except UnknownJob:  # a reload has removed it
            return None
        return Retries(settings.retries, settings.retry_after, before)

    def _work(self, run: Run, job: Job[Any], context: JobContext) -> JobReport:
        self._supervisor.begun(run)
        report = run_job(job, context, run.settings, run.run_id, known_reason=self._skipped.get(job.id))
        self._skipped[job.id] = report.reason if report.outcome == "skipped" else None
        self._supervisor.end(run, report, self._retries(job.id, run.settings))
        return report


def run_job(
    job: Job[Any],
    context: JobContext,
    settings: JobSettings,
    run_id: int | None = None,
    *,
    known_reason: str | None = None,
) -> JobReport:
    """Run `job` in this thread and return its report. Raises only exceptions that are to end the program.

    The report of a job that ended early counts the work that it had done by then. `run_id` is the run's number in the
    ledger. A run that is skipped for `known_reason`, as the run before it was, is logged at debug level only.
    """
    started_at, begun = datetime.now(UTC), time.monotonic()
    with logs.context(job=job.id, **({} if run_id is None else {"run_id": run_id})):
        log.debug("job_started", dry_run=context.dry_run)
        outcome, reason = _outcome(job, context, settings)
        report = JobReport(
            job=job.id,
            outcome=outcome,
            reason=reason,
            counts=dict(context.counts),
            started_at=started_at,
            duration=timedelta(seconds=time.monotonic() - begun),
            dry_run=context.dry_run,
            by_provider={provider: dict(counts) for provider, counts in context.by_provider.items()},
            provider_reasons=dict(context.provider_reasons),
            run_id=run_id,
        )
        _tell(report, known_reason)
    return report


def broken_off(job: Job[Any], context: JobContext, error: BaseException, run_id: int) -> JobReport:
    """Return the report of a run that this error ended inside or outside of `run_job`."""
    kind = type(error).__name__
    ends_program = is_for_the_program(error)
    return JobReport(
        job=job.id,
        outcome="aborted" if ends_program else "failed",
        reason=f"the program was interrupted by {kind}" if ends_program else f"{kind}: see the log for the traceback",
        counts=dict(context.counts),
        started_at=datetime.now(UTC) - context.elapsed(),
        duration=context.elapsed(),
        dry_run=context.dry_run,
        run_id=run_id,
    )


def not_run(job_id: str, outcome: Outcome, reason: str, *, dry_run: bool) -> JobReport:
    """Return the report of a run that did not begin."""
    return JobReport(job_id, outcome, reason, {}, datetime.now(UTC), timedelta(0), dry_run)


def _outcome(job: Job[Any], context: JobContext, settings: JobSettings) -> tuple[Outcome, str | None]:
    try:
        context.checkpoint()
        if refusal := job.refused_on(context.database):
            raise JobSkipped(refusal)
        if job.tables:
            with context.transaction() as connection:
                require_tables(connection, context.tables, job.id, job.tables)
        job.run(context, settings)
        context.require_in_time()
    except JobSkipped as skipped:
        return "skipped", str(skipped)
    except JobAborted as aborted:
        return "aborted", str(aborted)
    except JobTimedOut as timed_out:
        return "timed_out", str(timed_out)
    except CatfeederCronError as error:
        return "failed", str(error)
    except BaseException as error:
        if is_for_the_program(error):
            raise
        log.exception("job_raised")
        # Its text may hold secrets, and everybody may read the history.
        return "failed", f"{type(error).__name__}: see the log for the traceback"
    return "succeeded", None


def _tell(report: JobReport, known_reason: str | None) -> None:
    """Log the one canonical event of a run, at debug level if the run found nothing to do.

    A job that counts nothing, such as a custom callable, has done something whenever it succeeds.
    """
    did_something = any(report.counts.values()) if report.counts else report.outcome == "succeeded"
    fields = {
        "outcome": report.outcome,
        **({"reason": report.reason} if report.reason else {}),
        **report.counts,
        "duration_seconds": round(report.duration.total_seconds(), 3),
        **({"dry_run": True} if report.dry_run else {}),
    }
    if report.outcome in ("failed", "timed_out"):
        log_of_results.error("job_finished", **fields)
    elif report.outcome == "aborted":
        log_of_results.warning("job_finished", **fields)
    elif did_something or (report.reason and report.reason != known_reason):
        log_of_results.info("job_finished", **fields)
    else:
        log_of_results.debug("job_finished", **fields)
