"""Ends what the server still does for runs that are over, or whose processes are dead.

The transactions of a run bear a name, so that any process finds the backend that works for it in pg_stat_activity.
"""

from catfeeder_cron.database import Database
from catfeeder_cron.ledger import statements
from catfeeder_cron.ledger.records import Process


class Backends:
    """The server's backends that work for runs. All methods may be called from any thread."""

    def __init__(self, database: Database, process: Process) -> None:
        self._database = database
        self._process = process

    def name_for(self, run_id: int) -> str:
        """Return the application_name of the transactions of a run of this process."""
        return f"catfeeder-cron run {run_id} {str(self._process.daemon)[:8]}"

    def end_those_of(self, run_id: int) -> tuple[int, int]:
        """End what the server still does for a run of this process. Raises DatabaseError.

        Returns how many backends have ended, and how many are still at work after 5 seconds each.
        """
        ((ended, left),) = self._database.query(statements.END_BACKENDS_OF, {"name": self.name_for(run_id)})
        return ended, left

    def end(self, pid: int) -> None:
        """End the backend that still works for a dead process. Raises PermissionDenied for one of another role."""
        self._database.query(statements.END_BACKEND, {"pid": pid})
