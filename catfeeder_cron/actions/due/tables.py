"""The tables of actions as they are in this database: their names, and how their columns hold times."""

from dataclasses import dataclass
from functools import cached_property
from typing import LiteralString, Self

from psycopg import sql

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Connection
from catfeeder_cron.database.time_columns import WITH_ZONE, TimeColumn

_TYPES = """
    SELECT c.relname, a.attname, format_type(CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, NULL)
    FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid JOIN pg_attribute a ON a.attrelid = c.oid
    JOIN pg_type t ON t.oid = a.atttypid
    WHERE n.nspname = %s AND c.relname IN (%s, %s) AND a.attnum > 0
      AND a.attname IN ('due_at', 'lease_until', 'started_at', 'finished_at')"""

# In a column without a zone, the later reading of a time counts: nobody may take over a row whose lease lasts, and a
# repetition is not due again at once. The first condition is for the index.
_IS_PAST: LiteralString = "{column} {comparison} {now} AND {instant} {comparison} now()"

# By the later reading, too, since no row is handed out before that. The clock may be set back after `since`.
_IS_AFTER: LiteralString = "{column} > {since} - interval '25 h' AND {instant} > went_back.since"


@dataclass(frozen=True)
class ActionTables:
    """The names of the tables, and how the columns for times hold them."""

    tables: DatabaseTables
    due_at: TimeColumn = WITH_ZONE
    lease_until: TimeColumn = WITH_ZONE
    started_at: TimeColumn = WITH_ZONE
    finished_at: TimeColumn = WITH_ZONE

    @classmethod
    def find(cls, connection: Connection, tables: DatabaseTables, zone: str) -> Self | None:
        """Return the tables, or None if there is none of actions; `zone` is that of columns without one.

        Raises SchemaProblem where a column needs the zone and the server does not know it.
        """
        rows = connection.execute(_TYPES, [tables.schema_, tables.actions, tables.action_log]).fetchall()
        found = {column: TimeColumn.of(connection, its, zone) for _, column, its in rows}
        return cls(tables, **found) if any(table == tables.actions for table, _, _ in rows) else None

    def statement(self, text: LiteralString, **parts: LiteralString) -> sql.Composed:
        """Return the statement with the names of the tables, and what reads and writes times, filled in.

        The `parts` are filled in themselves, and then into the statement.
        """
        known = self._known
        return sql.SQL(text).format(**known, **{name: sql.SQL(part).format(**known) for name, part in parts.items()})

    @cached_property
    def _known(self) -> dict[str, sql.Composable]:
        return {
            "actions": sql.Identifier(self.tables.schema_, self.tables.actions),
            "action_log": sql.Identifier(self.tables.schema_, self.tables.action_log),
            "due": self.due_at.latest("due_at"),
            "due_of_a": self.due_at.latest("a.due_at"),
            "is_due": _is_past(self.due_at, "due_at", "<="),
            "due_after_since": _is_after_since(self.due_at, "due_at"),
            "lease": self.lease_until.latest("lease_until"),
            "lease_at_earliest": self.lease_until.earliest("lease_until"),
            "lease_is_over": _is_past(self.lease_until, "lease_until", "<"),
            "lease_ends": self.lease_until.stored("clock_timestamp() + %(lease)s"),
            "retry_shown": self.due_at.stored("r.retry_at"),
            "retry_at": self.due_at.stored("next.retry_at"),
            "repeat_at": self.due_at.stored("repeat_at"),
            "started": self.started_at.stored("start::timestamptz"),
            "owner_started": self.started_at.stored("right(lease_owner, 27)::timestamptz"),
            "finished": self.finished_at.stored("greatest(start::timestamptz, now() - age * interval '1 second')"),
            "finished_now": self.finished_at.stored("now()"),
        }


def _is_past(times: TimeColumn, column: LiteralString, comparison: LiteralString) -> sql.Composable:
    if times.zone is None:
        return sql.SQL("{} {} now()").format(sql.SQL(column), sql.SQL(comparison))
    return sql.SQL(_IS_PAST).format(
        column=sql.SQL(column),
        comparison=sql.SQL(comparison),
        now=times.stored("now()"),
        instant=times.latest(column),
    )


def _is_after_since(times: TimeColumn, column: LiteralString) -> sql.Composable:
    if times.zone is None:
        return sql.SQL("{} > went_back.since").format(sql.SQL(column))
    return sql.SQL(_IS_AFTER).format(
        column=sql.SQL(column), since=times.stored("went_back.since"), instant=times.latest(column)
    )
