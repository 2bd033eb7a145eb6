"""One run of a configured job in this process: what it is given, who watches over it, who is told of it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from catfeeder_cron.children.pool import Children
from catfeeder_cron.config import CustomJobSettings, JobSettings, Settings
from catfeeder_cron.custom_jobs import custom_job
from catfeeder_cron.database import Database
from catfeeder_cron.database.requirements import explain
from catfeeder_cron.errors import CatfeederCronError, UnknownJob
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.ledger import Retries
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.report import JobReport, Progress, no_progress
from catfeeder_cron.schedule import Schedule
from catfeeder_cron.scheduler.pings import Pings, Signal
from catfeeder_cron.scheduler.runner import broken_off, run_job
from catfeeder_cron.scheduler.supervisor import Run, Supervisor

log = get_logger(__name__)


class Workshop:
    """Runs the jobs of the configuration that is in force. All methods may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        jobs: Mapping[str, Job[Any]],
        database: Database,
        supervisor: Supervisor,
        oauth: OAuthClient | None = None,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._database = database
        self._supervisor = supervisor
        self._owns_oauth = oauth is None
        self._oauth = oauth or OAuthClient(settings.oauth)
        self._pings = Pings()
        self._children = Children()
        self._skipped: dict[str, str | None] = {}

    @property
    def settings(self) -> Settings:
        """The configuration that is in force."""
        return self._settings

    @property
    def stopping(self) -> bool:
        """Whether no run may begin any more."""
        return self._supervisor.stopping

    def take_over(self, settings: Settings) -> None:
        """Put another configuration in force. An OAuth client that was handed in stays."""
        if self._owns_oauth and settings.oauth != self._settings.oauth:
            self._oauth = OAuthClient(settings.oauth)
        self._settings = settings
        self._children.retire()  # what they have imported may be another by now

    def find(self, job_id: str) -> tuple[Job[Any], JobSettings]:
        """Return a job and its settings. Raises UnknownJob, which names the nearest id."""
        settings = self._settings.require_job(job_id)
        if isinstance(settings, CustomJobSettings):
            return custom_job(job_id, settings), settings
        return self._jobs[job_id], settings

    def schedule(self, job_id: str) -> Schedule:
        """Return when a job is due. Raises UnknownJob."""
        return self._settings.schedule(job_id)

    def context(self, job_id: str, progress: Progress = no_progress, slot: datetime | None = None) -> JobContext:
        """Return what a run of a job is given, for its `slot` or for none. Raises UnknownJob."""
        settings = self._settings
        return JobContext(
            database=self._database,
            tables=settings.database.tables,
            timeout=settings.require_job(job_id).timeout,
            actions=settings.actions,
            progress=progress,
            schedule=settings.schedule(job_id),
            slot=slot,
            oauth=self._oauth,
            children=self._children,
        )

    def run(
        self,
        job_id: str,
        claim: Callable[[], int | None],
        progress: Progress = no_progress,
        slot: datetime | None = None,
    ) -> JobReport | None:
        """Do the run that `claim` gets, in this thread, and return what is to be told of it; None when it gets none.

        Raises UnknownJob, what Supervisor.begin raises, and what `claim` does.
        """
        job, settings = self.find(job_id)
        context = self.context(job_id, progress, slot)
        run = self._supervisor.begin(job_id, context, claim)
        if run is None:
            return None
        try:
            self._supervisor.begun()
            return self._work(run, job, context, settings)
        except BaseException as error:
            # Whatever it is and wherever it came up, the run must not stay open. One that has ended stays as it is.
            self._supervisor.end(run, broken_off(job, context, error, run.run_id))
            raise

    def dry_run(self, job_id: str, progress: Progress = no_progress) -> JobReport:
        """Have a job count what it would do. That is claimed by nobody, and leaves no trace. Raises UnknownJob."""
        job, settings = self.find(job_id)
        context = self.context(job_id, progress)
        context.dry_run = True
        return run_job(job, context, settings)

    def explain(self, job_id: str, problem: CatfeederCronError) -> str:
        """Say why a job could not do something. Raises UnknownJob."""
        return explain(problem, job_id, self.find(job_id)[0].tables, self._database, self._settings.database.tables)

    def close(self, abandoned: str | None = None) -> None:
        """Wait for the runs to end; with `abandoned` record them instead, as aborted for this reason. Idempotent."""
        if abandoned is None:
            self._supervisor.wait()
        for job_id in self._supervisor.running:
            with suppress(UnknownJob):  # a reload has removed it
                self._ping(job_id, self.find(job_id)[1], "fail", abandoned or "")
        self._supervisor.close(abandoned)
        self._children.close()
        self._pings.close()

    def _retries(self, job_id: str, settings: JobSettings) -> Retries | None:
        if not isinstance(settings, CustomJobSettings) or not settings.retries:
            return None
        try:
            before = self._settings.schedule(job_id).next_after(datetime.now(UTC))
        except UnknownJob:  # a reload has removed it
            return None
        return Retries(settings.retries, settings.retry_after, before)

    def _work(self, run: Run, job: Job[Any], context: JobContext, settings: JobSettings) -> JobReport:
        self._ping(job.id, settings, "start")
        report = run_job(job, context, settings, run.run_id, known_reason=self._skipped.get(job.id))
        self._skipped[job.id] = report.reason if report.outcome == "skipped" else None
        self._supervisor.end(run, report, self._retries(job.id, settings))
        succeeded = report.outcome in ("succeeded", "skipped")
        self._ping(job.id, settings, "success" if succeeded else "fail", report.reason or "")
        return report

    def _ping(self, job_id: str, settings: JobSettings, signal: Signal, text: str = "") -> None:
        """Send a ping; where there is no thread to be had for that, the run is worth more."""
        try:
            self._pings.send(job_id, settings.ping_url, signal, text)
        except RuntimeError as error:
            log.warning("ping_not_sent", job=job_id, signal=signal, reason=str(error))
