"""Has jobs look after their files, whether they are enabled or not."""

from uuid import UUID

from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable
from catfeeder_cron.logs import get_logger
from catfeeder_cron.scheduler.executor import Executor
from catfeeder_cron.scheduler.job_tasks import JobTasks
from catfeeder_cron.scheduler.listeners import RunListener
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.scheduler")

_EVERY_SECONDS = 300.0
# For so long after a failover other hosts may wait for what this one does.
_OFTEN_SECONDS = 300.0


class JobTending(RunListener):
    """Calls `Job.tend` in a worker thread. All methods may be called from any thread."""

    def __init__(self, tasks: JobTasks, executor: Executor, database: Database) -> None:
        self._tasks = tasks
        self._executor = executor
        self._database = database
        self._started = False
        self._next = self._often_until = float("-inf")
        self._lineage: UUID | None = None

    def start(self) -> None:
        """Begin with the next heartbeat."""
        self._started = True

    def beat(self, reached: bool, /) -> None:
        """Have the jobs tended every few minutes; at every heartbeat after the database's history went back.

        It begins with the first contact: before that nothing tells which files are needed.
        """
        if not reached:
            return
        now, lineage = elapsed_seconds(), self._database.lineage
        if lineage and lineage.reason and lineage.id != self._lineage:
            self._lineage, self._often_until = lineage.id, now + _OFTEN_SECONDS
        if not self._started or self._executor.stopping or self._next > now > self._often_until:
            return
        self._next = now + _EVERY_SECONDS
        for job_id in self._executor.settings.jobs:
            if self._executor.find(job_id)[0].tend is not None:
                self._tasks.run_soon("tending", self._tend, job_id)

    def _tend(self, job_id: str) -> None:
        """Tend a job. Called in a worker thread."""
        try:
            job, _ = self._executor.find(job_id)
            if job.tend is not None:
                job.tend(self._executor.context(job_id))
        except DatabaseUnavailable:
            pass  # the database has logged it
        except CatfeederCronError as error:
            log.error("job_not_tended", job=job_id, reason=self._executor.explain(job_id, error))
