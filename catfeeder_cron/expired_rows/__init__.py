"""Delete the expired rows of a table, in transactions so short that they do not disturb the web server.

Every DELETE repeats the condition and none relies on rows that an earlier transaction found, so a row that the web
server prolongs meanwhile is kept. There are three ways, chosen for each leaf of the table:

by_index     if few rows have expired and an index begins with the expiry: in the index's order. Its cost depends on
             the number of expired rows, not on the size of the table.
by_blocks    otherwise: over the table's blocks, a range of them at a time. It is as fast as one big DELETE, with or
             without an index, because it reads every block once and in order.
row_by_row   for one batch, in which a row is locked or kept by a constraint.
"""

from datetime import timedelta

from pydantic import Field

from catfeeder_cron.config import Duration, JobSettings
from catfeeder_cron.database import catalog, single
from catfeeder_cron.database.time_columns import TimeColumn
from catfeeder_cron.errors import LockTimeout
from catfeeder_cron.expired_rows import by_blocks, by_index
from catfeeder_cron.expired_rows.leaf import LeafDeletion
from catfeeder_cron.job import JobContext


class ExpiredRowsSettings(JobSettings):
    """The options of every clean-up job."""

    batch_size: int = Field(default=10_000, ge=1)
    """The most rows that one transaction deletes."""
    max_rows: int | None = Field(default=None, ge=1)
    """The most rows that one run deletes; the rest waits for the next run."""
    keep_expired_for: Duration = timedelta(0)
    """How long a row is kept after its expiry."""


def delete_expired(context: JobContext, name: str, expiry: str, settings: ExpiredRowsSettings) -> None:
    """Delete the rows of table `name` whose column `expiry` has passed by the database's clock; NULL never passes.

    Counts `deleted`, and `remaining`: expired rows that were left because another session has locked them or a
    constraint keeps them. A dry run counts `would_delete`. A row that expires during the run waits for the next run.
    Any number of these runs may work at the same time, on any number of machines. Raises LockTimeout when the whole
    table is locked.
    """
    deletions = _inspect(context, name, expiry, settings)
    if context.dry_run:
        found = sum(deletion.count_deletable() for deletion in deletions)
        context.counts["would_delete"] = found if settings.max_rows is None else min(found, settings.max_rows)
        return
    context.counts.update(deleted=0, remaining=0)
    blocks_before, blocks = 0, sum(deletion.leaf.blocks for deletion in deletions)
    for deletion in deletions:
        deletion.blocks_before, deletion.blocks_in_all = blocks_before, blocks
        try:
            if not by_index.delete_if_few(deletion):
                by_blocks.delete(deletion)
        except LockTimeout as error:
            raise LockTimeout(
                f"{deletion.leaf} is locked as a whole; the next run goes on from here: {error}"
            ) from None
        blocks_before += deletion.leaf.blocks
    context.progress(blocks, blocks)


def _inspect(context: JobContext, name: str, expiry: str, settings: ExpiredRowsSettings) -> list[LeafDeletion]:
    with context.transaction() as connection:
        oid, column_type = catalog.find_table(connection, context.tables.schema_, name, expiry)
        leaves = catalog.leaves(connection, oid, expiry)
        foreign_keys = [catalog.foreign_keys(connection, leaf) for leaf in leaves]
        (instant,) = single(connection, "SELECT (now() - %s)::text", [settings.keep_expired_for])
        times = TimeColumn.of(connection, column_type, context.database.naive_timestamps)
        cutoff = times.first_not_over(connection, instant)
    return [
        LeafDeletion(context, leaf, expiry, times.type, cutoff, keeping, settings.batch_size, settings.max_rows)
        for leaf, keeping in zip(leaves, foreign_keys, strict=True)
    ]
