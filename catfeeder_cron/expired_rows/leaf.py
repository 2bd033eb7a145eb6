"""The deletion of one leaf's rows in one run: its statements' common parts, its counts, and the rows it has to keep."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, LiteralString

from psycopg import sql

from catfeeder_cron.database import Connection, identifier, single
from catfeeder_cron.database.catalog import ForeignKey, Leaf
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.expired_rows")

# How long a batch waits for another session's row lock; meanwhile it holds its own.
LOCK_TIMEOUT = "50ms"
MOST_NAMED = 5

EXPIRED = "{expiry} < %(cutoff)s::{time}"

_COUNT = "SELECT count(*) FROM ONLY {leaf} AS leaf WHERE {scope} {unreferenced}"

_COUNT_KEPT = "SELECT count(*) FROM ONLY {leaf} AS leaf WHERE {scope} AND EXISTS ({referring}) {unreferenced}"
# to_jsonb, so that the statement works for a table without a column "id", too.
_NAME_KEPT = """
    SELECT to_jsonb(leaf) ->> 'id' FROM ONLY {leaf} AS leaf WHERE {scope} AND EXISTS ({referring}) {unreferenced}
    LIMIT %(most)s"""


@dataclass
class Kept:
    """The rows that one constraint keeps: their number, and the ids of the first few."""

    rows: int = 0
    ids: list[str | None] = field(default_factory=list)


@dataclass
class LeafDeletion:
    """The deletion of one leaf's expired rows. `blocks_before` and `blocks_in_all` are for the progress of the run."""

    context: JobContext
    leaf: Leaf
    expiry: str
    time: sql.SQL
    """The type of the cutoff, and of a row's expiry as text."""
    cutoff: str
    """A row has expired if its expiry is less."""
    foreign_keys: list[ForeignKey]
    batch_size: int
    max_rows: int | None
    blocks_before: int = 0
    blocks_in_all: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)
    """Rows that are kept by a constraint that is not in `foreign_keys`, by the constraint's name."""

    def room(self) -> int:
        """Return how many rows the next batch may delete."""
        if self.max_rows is None:
            return self.batch_size
        return min(self.batch_size, self.max_rows - self.context.counts["deleted"])

    def batch(self, **local: str) -> AbstractContextManager[Connection]:
        """Open a batch's transaction.

        It does not wait for the disk: if a crash of the server loses a batch, the next run deletes its rows again.
        """
        settings: dict[str, str | int] = {"lock_timeout": LOCK_TIMEOUT, "synchronous_commit": "off", **local}
        return self.context.transaction(**settings)

    def statement(self, text: LiteralString, scope: LiteralString = EXPIRED, **parts: sql.Composable) -> sql.Composed:
        """Return the statement with this leaf's names; its {unreferenced} excludes rows that a foreign key keeps."""
        names: dict[str, sql.Composable] = {
            "leaf": identifier(self.leaf.schema, self.leaf.name),
            "expiry": identifier(self.expiry),
            "time": self.time,
        }
        unreferenced = sql.SQL("").join(
            sql.SQL(" AND NOT EXISTS ({})").format(self._referring(foreign_key)) for foreign_key in self.foreign_keys
        )
        return sql.SQL(text).format(
            **{"scope": sql.SQL(scope).format(**names), "unreferenced": unreferenced, **names, **parts}
        )

    def parameters(self, **more: Any) -> dict[str, Any]:
        """Return the parameters that every statement needs, and these."""
        return {"cutoff": self.cutoff, **more}

    def deleted(self, rows: int) -> None:
        """Count rows that were deleted."""
        self.context.counts["deleted"] += rows

    def progress(self, blocks: int) -> None:
        """Report how many of the leaf's blocks are done."""
        self.context.progress(self.blocks_before + blocks, self.blocks_in_all)

    def count_deletable(self) -> int:
        """Count the expired rows that no foreign key keeps."""
        with self.context.transaction() as connection:
            return self._count(connection, EXPIRED, {})

    def count_remaining(self, scope: LiteralString = EXPIRED, **parameters: Any) -> int:
        """Count and return the rows that are left in a scope after the deletion: locked ones and kept ones."""
        with self.context.transaction() as connection:
            rows = self._count(connection, scope, parameters)
        self.context.counts["remaining"] += rows
        return rows

    def report_kept_rows(self) -> None:
        """Count and log the expired rows that constraints keep."""
        foreign_keys, self.foreign_keys = self.foreign_keys, []
        for foreign_key in foreign_keys:
            referring = self._referring(foreign_key)
            count = self.statement(_COUNT_KEPT, referring=referring)
            name = self.statement(_NAME_KEPT, referring=referring)
            with self.context.transaction() as connection:
                (rows,) = single(connection, count, self.parameters())
                ids = [row[0] for row in connection.execute(name, self.parameters(most=MOST_NAMED))] if rows else []
            self.foreign_keys.append(foreign_key)
            self.context.counts["remaining"] += rows
            if rows:
                self._warn(foreign_key.constraint, Kept(rows, ids))
        for constraint, kept in self.kept.items():
            self._warn(constraint, kept)

    def _warn(self, constraint: str, kept: Kept) -> None:
        ids = ", ".join(map(str, kept.ids))
        log.warning("expired_rows_kept", table=str(self.leaf), constraint=constraint, rows=kept.rows, ids=ids)

    def _count(self, connection: Connection, scope: LiteralString, parameters: dict[str, Any]) -> int:
        (rows,) = single(connection, self.statement(_COUNT, scope), self.parameters(**parameters))
        return int(rows)

    def _referring(self, foreign_key: ForeignKey) -> sql.Composed:
        conditions: list[sql.Composable] = [
            sql.SQL("{} = {}").format(identifier("referring", own), identifier("leaf", referenced))
            for own, referenced in foreign_key.columns
        ]
        if foreign_key.of_itself:  # a row that refers to itself does not keep itself
            conditions.append(sql.SQL("(referring.tableoid, referring.ctid) <> (leaf.tableoid, leaf.ctid)"))
        return sql.SQL("SELECT FROM {} {} AS referring WHERE {}").format(
            sql.SQL("" if foreign_key.partitioned else "ONLY"),
            identifier(foreign_key.schema, foreign_key.table),
            sql.SQL(" AND ").join(conditions),
        )
