"""One run's deletion over one leaf: what its statements have in common, and what it found that can't be deleted."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, LiteralString

from psycopg import sql

from catfeeder_cron.database import Connection, identifier, single
from catfeeder_cron.database.catalog import ForeignKey, Leaf
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.expired_rows")

# What a batch spends on waiting for somebody else's row lock, while it holds its own.
LOCK_TIMEOUT = "50ms"
MOST_NAMED = 5

EXPIRED = "{expiry} < %(cutoff)s::timestamptz"

_COUNT = "SELECT count(*) FROM ONLY {leaf} AS leaf WHERE {scope} {unreferenced}"

_COUNT_KEPT = "SELECT count(*) FROM ONLY {leaf} AS leaf WHERE {scope} AND EXISTS ({referring}) {unreferenced}"
# to_jsonb, because a table without a column "id" is no reason to fail.
_NAME_KEPT = """
    SELECT to_jsonb(leaf) ->> 'id' FROM ONLY {leaf} AS leaf WHERE {scope} AND EXISTS ({referring}) {unreferenced}
    LIMIT %(most)s"""


@dataclass
class Kept:
    """Rows that one constraint keeps: how many, and the ids of the first."""

    rows: int = 0
    ids: list[str | None] = field(default_factory=list)


@dataclass
class LeafDeletion:
    context: JobContext
    leaf: Leaf
    expiry: str
    cutoff: str
    foreign_keys: list[ForeignKey]
    batch_size: int
    max_rows: int | None
    blocks_before: int = 0
    blocks_in_all: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)
    """Rows that turned out to be kept by a constraint that `foreign_keys` does not show, by its name."""

    def room(self) -> int:
        """Rows that the next batch may delete."""
        if self.max_rows is None:
            return self.batch_size
        return min(self.batch_size, self.max_rows - self.context.counts["deleted"])

    def batch(self, **local: str) -> AbstractContextManager[Connection]:
        """Open a batch's transaction. A batch that a crashing server loses is deleted again by the next run, so nobody
        waits for the disk.
        """
        settings: dict[str, str | int] = {"lock_timeout": LOCK_TIMEOUT, "synchronous_commit": "off", **local}
        return self.context.transaction(**settings)

    def statement(self, text: LiteralString, scope: LiteralString = EXPIRED, **parts: sql.Composable) -> sql.Composed:
        """Fill in the names of this leaf. Rows that a foreign key keeps are left out by {unreferenced}."""
        names = {"leaf": identifier(self.leaf.schema, self.leaf.name), "expiry": identifier(self.expiry)}
        unreferenced = sql.SQL("").join(
            sql.SQL(" AND NOT EXISTS ({})").format(self._referring(foreign_key)) for foreign_key in self.foreign_keys
        )
        return sql.SQL(text).format(
            **{"scope": sql.SQL(scope).format(**names), "unreferenced": unreferenced, **names, **parts}
        )

    def parameters(self, **more: Any) -> dict[str, Any]:
        return {"cutoff": self.cutoff, **more}

    def deleted(self, rows: int) -> None:
        self.context.counts["deleted"] += rows

    def progress(self, blocks: int) -> None:
        self.context.progress(self.blocks_before + blocks, self.blocks_in_all)

    def count_deletable(self) -> int:
        with self.context.transaction() as connection:
            return self._count(connection, EXPIRED, {})

    def count_remaining(self, scope: LiteralString = EXPIRED, **parameters: Any) -> int:
        """Count what is still there of a scope that was gone through: what others hold or a constraint keeps."""
        with self.context.transaction() as connection:
            rows = self._count(connection, scope, parameters)
        self.context.counts["remaining"] += rows
        return rows

    def tell_what_is_kept(self) -> None:
        """Count and name the expired rows that foreign keys keep."""
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
        if foreign_key.of_itself:  # a row that refers to itself keeps nobody
            conditions.append(sql.SQL("(referring.tableoid, referring.ctid) <> (leaf.tableoid, leaf.ctid)"))
        return sql.SQL("SELECT FROM {} {} AS referring WHERE {}").format(
            sql.SQL("" if foreign_key.partitioned else "ONLY"),
            identifier(foreign_key.schema, foreign_key.table),
            sql.SQL(" AND ").join(conditions),
        )
