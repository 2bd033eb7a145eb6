"""Ends the runs of a process that is cut off from the database, before others may begin their jobs.

It goes by this process's own clock, and needs no database. Runs of a job whose rows are shared out by leases go on: the
leases are their fence.
"""

from catfeeder_cron.errors import JobAborted
from catfeeder_cron.ledger.constants import FENCE_GRACE_SECONDS, FENCE_SECONDS
from catfeeder_cron.logs import get_logger
from catfeeder_cron.scheduler.listeners import Run
from catfeeder_cron.scheduler.open_runs import OpenRuns
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.scheduler")

CUT_OFF = f"cut off from the database for {FENCE_SECONDS} s, after which others may begin the job"

# While runs are under way, the age of the heartbeat is looked at this often at least: no wait goes on while the machine
# sleeps.
_LOOK_SECONDS = 5.0


def enforce(runs: OpenRuns, last_beat: float) -> float:
    """Ask every run to end that others may begin soon; return after how many seconds to look again.

    `last_beat` is when the last heartbeat that arrived was sent, by times.elapsed_seconds. One thread may call this.
    """
    exclusive = [run for run in runs.under_way if not run.origin.shared and not run.is_cut_off]
    left = FENCE_SECONDS - (elapsed_seconds() - last_beat)
    if left > 0 and exclusive:
        return min(left, _LOOK_SECONDS)
    for run in exclusive:
        run.is_cut_off = True
        log.error("run_cut_off", job=run.job_id, run_id=run.run_id, reason=CUT_OFF)
        run.control.stop.set(JobAborted(CUT_OFF, FENCE_GRACE_SECONDS))
    return float("inf")


def put_off(run: Run, last_beat: float) -> None:
    """Have what the run has started in other processes die later, because a heartbeat has arrived.

    It dies by that deadline even if this process is frozen.
    """
    if not run.origin.shared:
        run.control.deadline.set(last_beat + FENCE_SECONDS + FENCE_GRACE_SECONDS)
