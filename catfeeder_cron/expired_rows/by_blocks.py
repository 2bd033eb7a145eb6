"""Delete a leaf's expired rows, one range of its blocks after the other."""

import time

from catfeeder_cron.errors import ConstraintViolation, LockTimeout
from catfeeder_cron.expired_rows import row_by_row
from catfeeder_cron.expired_rows.leaf import LeafDeletion
from catfeeder_cron.expired_rows.row_by_row import Position

# The time that a range should take: long enough that its overhead is small, short enough that a session that writes one
# of its rows hardly waits (`make bench` shows both).
_AIM_SECONDS = 0.020
_FIRST_BLOCKS = 32
# Limits how many rows a range can meet right after many blocks without any.
_MOST_BLOCKS = 512

# IS TRUE keeps the planner from using an index on the expiry: with stale statistics it would read all expired rows
# through it for every range.
_DELETE = """
    DELETE FROM ONLY {leaf} AS leaf
    WHERE ctid >= %(first)s::tid AND ctid < %(last)s::tid AND ({expiry} < %(cutoff)s::{time}) IS TRUE
          {unreferenced}"""

_RANGE = "ctid > %(place)s::tid AND ctid <= %(last)s::tid AND ({expiry} < %(cutoff)s::{time}) IS TRUE"


class _TooManyRows(Exception):
    def __init__(self, rows: int) -> None:
        self.rows = rows


def delete(deletion: LeafDeletion) -> None:
    """Delete the expired rows of the whole leaf, in its size at the start: rows added later can't have expired then."""
    # Composed once, because thousands of ranges may follow that take two milliseconds each.
    statement = deletion.statement(_DELETE).as_bytes()
    first, blocks, wary = 0, _FIRST_BLOCKS, False
    while first < deletion.leaf.blocks and (room := deletion.room()):
        last = min(first + blocks, deletion.leaf.blocks)
        if not wary:
            try:
                blocks = _delete_range(deletion, statement, first, last)
            except _TooManyRows as too_many:
                if last - first > 1:
                    blocks = max(1, (last - first) * room // (2 * too_many.rows))
                    continue
                wary = True
            except (LockTimeout, ConstraintViolation):
                wary = True
        if wary:
            # After one row that can't be deleted, the next ranges are likely to hold more, and each would cost a wait.
            wary = _delete_row_by_row(deletion, first, last)
        deletion.progress(last)
        first = last
    deletion.report_kept_rows()


def _delete_range(deletion: LeafDeletion, statement: bytes, first: int, last: int) -> int:
    """Delete a range's expired rows, all or none; return the width of the next range, in blocks."""
    # A hash join would read the whole referring table for every range; it is only the cheapest way without an index.
    indexed = bool(deletion.foreign_keys) and all(foreign_key.indexed for foreign_key in deletion.foreign_keys)
    planner = {"enable_hashjoin": "off", "enable_mergejoin": "off"} if indexed else {}
    room, begun = deletion.room(), time.perf_counter()
    with deletion.batch(**planner) as connection:
        parameters = deletion.parameters(first=f"({first},0)", last=f"({last},0)")
        rows = connection.execute(statement, parameters).rowcount
        if rows > room:
            raise _TooManyRows(rows)
    deletion.deleted(rows)
    return _adapted(last - first, time.perf_counter() - begun, rows / room)


def _adapted(blocks: int, seconds: float, fullness: float) -> int:
    """Return the width that would have met the aimed time and used at most 95 % of the room.

    It is at most twice and at least a quarter of the last width.
    """
    factor = min(_AIM_SECONDS / seconds, 0.95 / fullness if fullness else 2.0)
    return max(1, min(_MOST_BLOCKS, round(blocks * max(0.25, min(2.0, factor)))))


def _delete_row_by_row(deletion: LeafDeletion, first: int, last: int) -> bool:
    """Delete those rows of a range that can be deleted; return whether any was left."""
    start, end = f"({first},0)", f"({last},0)"
    position: Position | None = Position(place=start)
    while position is not None and deletion.room():
        position = row_by_row.delete_next(deletion, _RANGE, "leaf.ctid", position, {"last": end}, {})
    return deletion.count_remaining(_RANGE, place=start, last=end if position is None else position.place) > 0
