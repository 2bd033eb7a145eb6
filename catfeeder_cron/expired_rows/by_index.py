"""Delete a leaf's expired rows through an index on their expiry, oldest first."""

from catfeeder_cron.database import single
from catfeeder_cron.errors import ConstraintViolation, LockTimeout
from catfeeder_cron.expired_rows import row_by_row
from catfeeder_cron.expired_rows.leaf import EXPIRED, LeafDeletion
from catfeeder_cron.expired_rows.row_by_row import Position

# The share of expired rows up to which this is faster than by_blocks, and the most rows that are counted to decide it.
_FEW = 0.015
_MOST_COUNTED = 100_000
# The most rows of a batch. Most lie on different pages, so a row costs twenty times as much as it does in by_blocks.
_MOST_ROWS = 2000

_COUNT_SOME = "SELECT count(*) FROM (SELECT FROM ONLY {leaf} AS leaf WHERE {scope} LIMIT %(limit)s) AS first_ones"

# Rows that were left, because they are locked or kept, lie before the position and are not read again.
_AFTER = """{expiry} < %(cutoff)s::{time} AND {expiry} >= %(expiry)s::{time}
    AND ({expiry} > %(expiry)s::{time} OR ctid > %(place)s::tid)"""
_UP_TO = """{expiry} <= %(expiry)s::{time} AND ({expiry} < %(expiry)s::{time} OR ctid <= %(place)s::tid)"""
_ORDER = "leaf.{expiry}, leaf.ctid"

# `picked` locks the next rows in the index's order, `deleted` deletes those of them that are still expired. The result
# has the position of the last row picked, from which the next batch goes on.
_DELETE = """
    WITH picked AS MATERIALIZED (
        SELECT ctid AS place, {expiry} AS expiry FROM ONLY {leaf} AS leaf WHERE {scope} {unreferenced}
        ORDER BY expiry, place LIMIT %(limit)s FOR UPDATE SKIP LOCKED),
    deleted AS (
        DELETE FROM ONLY {leaf} AS leaf
        WHERE ctid = ANY (ARRAY(SELECT place FROM picked)) AND {expiry} < %(cutoff)s::{time} RETURNING 1)
    SELECT count(*), (SELECT count(*) FROM deleted), max(expiry)::{time}::text,
           (max(place) FILTER (WHERE expiry = (SELECT max(expiry) FROM picked)))::text
    FROM picked"""

_THROUGH_THE_INDEX = {"enable_seqscan": "off", "enable_bitmapscan": "off"}


def delete_if_few(deletion: LeafDeletion) -> bool:
    """Delete the leaf's expired rows if there is an index for it and they are few; return whether that was so."""
    if not deletion.leaf.indexed:
        return False
    few = round(min(_MOST_COUNTED, max(deletion.batch_size, _FEW * deletion.leaf.estimated_rows)))
    with deletion.context.transaction(**_THROUGH_THE_INDEX) as connection:
        (found,) = single(connection, deletion.statement(_COUNT_SOME), deletion.parameters(limit=few + 1))
    if found > few:
        return False
    if found:
        _delete(deletion, found)
        deletion.report_kept_rows()
    return True


def _delete(deletion: LeafDeletion, found: int) -> None:
    before = deletion.context.counts["deleted"]
    position: Position | None = Position()
    while position is not None and deletion.room():
        position = _delete_next(deletion, position)
    if deletion.context.counts["deleted"] - before >= found:
        return  # no row was left, and a count would cost a tenth of the run
    if position is None:
        deletion.count_remaining(EXPIRED)
    else:
        deletion.count_remaining(_UP_TO, expiry=position.expiry, place=position.place)


def _delete_next(deletion: LeafDeletion, after: Position) -> Position | None:
    """Delete the batch after the position `after`; return the batch's last position, None at the end."""
    try:
        return _delete_batch(deletion, after)
    except (LockTimeout, ConstraintViolation):
        return row_by_row.delete_next(deletion, _AFTER, _ORDER, after, {}, _THROUGH_THE_INDEX)


def _delete_batch(deletion: LeafDeletion, after: Position) -> Position | None:
    limit = min(deletion.room(), _MOST_ROWS)
    parameters = deletion.parameters(limit=limit, expiry=after.expiry, place=after.place)
    with deletion.batch(**_THROUGH_THE_INDEX) as connection:
        picked, rows, expiry, place = single(connection, deletion.statement(_DELETE, _AFTER), parameters)
    deletion.deleted(rows)
    return Position(expiry, place) if picked == limit else None
