"""Which history of the database this process works on, and whether it is still that one.

A server may lose its last seconds: a standby that lagged is promoted, a backup is restored. Rows are then as they were
before, so work whose effect can't be undone would be done again. Each heartbeat (ledger/statements.py) looks whether
that has happened, and gives the lineage a new id if it has, or may have.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

# True as long as the database that the statement runs on is the one that this process's last heartbeat has met, and
# has lost nothing since. A statement that hands out what can't be undone has it as a condition: it finds nothing on a
# server that went back, even before a heartbeat has noticed that.
IS_CURRENT: LiteralString = """
    EXISTS (SELECT FROM catfeeder_cron.lineage l WHERE l.id = %(lineage)s AND l.server = catfeeder_cron.server()
            AND l.counter >= %(lineage_counter)s)"""


@dataclass(frozen=True)
class Lineage:
    """The row of catfeeder_cron.lineage as of a heartbeat of this process."""

    id: UUID
    since: datetime
    reason: str | None
    """Why it has this id; None for the first one."""
    server: str
    """The server's system identifier, its timeline (hexadecimal) and the table's oid, with slashes between."""
    counter: int
    stale: str = ""
    """Why this server must be an old copy of the one that this host has worked with; empty if it is none, as far as
    is known."""

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of IS_CURRENT."""
        return {"lineage": self.id, "lineage_counter": self.counter}
