"""Run one job, now, and say how it ended: the one place where a job's errors are decided on."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from catfeeder_cron import logs
from catfeeder_cron.config import JobSettings
from catfeeder_cron.database.requirements import explain
from catfeeder_cron.errors import CatfeederCronError, JobAborted, JobSkipped, JobTimedOut
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport, Outcome
from catfeeder_cron.run_control import is_for_the_program

log = get_logger(__name__)
# By itself, so that a command that prints the result can leave it out.
log_of_results = get_logger(f"{__name__}.result")


def run_job(
    job: Job[Any],
    context: JobContext,
    settings: JobSettings,
    run_id: int | None = None,
    *,
    known_reason: str | None = None,
) -> JobReport:
    """Run `job` in this thread and return what is to be told of it. Raises only what is to end the program.

    What the job had done before it ended early stands in the report's counts. `run_id` is its number in the ledger.
    That it was skipped for `known_reason`, as the run before it, is no news.
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
    """Return the report of a run that `run_job` did not come back from, because of this error."""
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
    """Return the report of a run that did not come to be."""
    return JobReport(job_id, outcome, reason, {}, datetime.now(UTC), timedelta(0), dry_run)


def _outcome(job: Job[Any], context: JobContext, settings: JobSettings) -> tuple[Outcome, str | None]:
    try:
        context.checkpoint()
        job.run(context, settings)
        context.require_in_time()
    except JobSkipped as skipped:
        return "skipped", str(skipped)
    except JobAborted as aborted:
        return "aborted", str(aborted)
    except JobTimedOut as timed_out:
        return "timed_out", str(timed_out)
    except CatfeederCronError as error:
        return "failed", explain(error, job.id, job.tables, context.database, context.tables)
    except BaseException as error:
        if is_for_the_program(error):
            raise
        log.exception("job_raised")
        # Its text may hold anything, and everybody may read the history.
        return "failed", f"{type(error).__name__}: see the log for the traceback"
    return "succeeded", None


def _tell(report: JobReport, known_reason: str | None) -> None:
    """Log the one canonical event of a run. A run that found nothing to do is no news.

    A job that counts nothing, such as a custom callable, has done what it does whenever it succeeds.
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
