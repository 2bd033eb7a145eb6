"""Runs jobs that only config.toml defines: one SQL statement, or one Python callable."""

from datetime import timedelta
from functools import partial

from catfeeder_cron.children.messages import Returned
from catfeeder_cron.children.pool import Call
from catfeeder_cron.children.process import DiedAtDeadline
from catfeeder_cron.config import CustomJobSettings
from catfeeder_cron.database import RollBack
from catfeeder_cron.errors import CallableRaised, CatfeederCronError, ChildDied, DatabaseError, JobSkipped
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.run_control import StopRequest

log = get_logger("catfeeder_cron.jobs")
# The lines that callables print go to a logger of their own, so that a command that logs little else can show them.
log_of_output = get_logger("catfeeder_cron.output")


def custom_job(job_id: str, settings: CustomJobSettings) -> Job[CustomJobSettings]:
    """Return the job that a [jobs.ID] table describes."""
    if settings.sql is not None:
        return Job(job_id, "a statement of SQL", CustomJobSettings, _run_sql)
    return Job(job_id, f"call {settings.call}", CustomJobSettings, lambda *run: _run_callable(job_id, *run))


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


def _run_callable(job_id: str, context: JobContext, settings: CustomJobSettings) -> None:
    """Call the function in another process.

    After a request to stop it has the grace of that to end, then it is killed. At the run's deadline its guard kills
    it, whatever this process does.
    """
    assert settings.call is not None
    key, children = f"job {job_id}", context.resources.children
    if context.dry_run:
        _wait(children.find(key, settings.call, on_line=_log_line), context)
        raise JobSkipped("a Python callable can't tell what it would do")
    keywords, deadline = settings.kwargs, context.deadline.at
    call = children.call(key, settings.call, *settings.args, keywords=keywords, deadline=deadline, on_line=_log_line)
    returned = _wait(call, context)
    # A callable that never looked whether it should stop has done all of its work.
    if returned.stop_was_seen or context.overdue() >= timedelta(0):
        context.raise_if_over()


def _wait(call: Call, context: JobContext) -> Returned:
    # The thread that sets the stop or the deadline calls these, and they don't wait; this thread waits for the result.
    ask_to_stop = partial(_ask_to_stop, call, context.stop)
    with context.deadline.calling(call.set_deadline), context.stop.calling(ask_to_stop):
        try:
            try:
                return call.future.result(timeout=max(0.0, -context.overdue().total_seconds()))
            except TimeoutError:
                context.time_out()  # this calls ask_to_stop
                return call.future.result()
        except ChildDied as error:
            reason = context.stop.reason
            if reason is None:
                raise
            if isinstance(error, DiedAtDeadline):
                raise type(reason)(f"{reason}; it did not end before others may run it, and was killed") from None
            if call.was_killed:
                seconds = context.stop.grace_seconds
                raise type(reason)(f"{reason}; it did not end within {seconds:g} s and was killed") from None
            raise
        except CallableRaised as error:
            log.error("job_raised", exception=error.traceback)
            # Its text may hold a secret, and every user may read the history.
            raise CatfeederCronError(f"{error.class_name}: see the log for the traceback") from None


def _ask_to_stop(call: Call, stop: StopRequest) -> None:
    call.ask_to_stop(stop.grace_left_seconds)


def _log_line(line: str) -> None:
    log_of_output.info("job_output", line=line)
