"""Reads and writes the web server's columns of times, with a zone or without one (`database.naive_timestamps`).

A column without a zone holds what a clock on the wall showed. When the clock is set back, it shows an hour twice, so a
time in that hour has two readings, of which PostgreSQL's AT TIME ZONE takes the later one; when the clock is set
forward, it skips an hour. A time in the skipped hour is read by the clock before the change, as AT TIME ZONE does it,
or by the clock after it, which is earlier. Each use takes the reading by which it can do no harm.

Everything is computed by the server, with its own knowledge of the zones.
"""

from dataclasses import dataclass
from typing import LiteralString, Self

from psycopg import errors as pg
from psycopg import sql

from catfeeder_cron.database import catalog
from catfeeder_cron.database.statements import Connection, single
from catfeeder_cron.errors import SchemaProblem

# No clock is set by more than a day at once (a country that crosses the date line), and none twice within two days, so
# that the offsets before and after a change are in force 25 hours before and after every time that the change touches.

# The first condition keeps infinite times, and those next to the limits of the type, from being moved by hours.
_EARLIEST: LiteralString = """
    CASE WHEN {column} NOT BETWEEN '0002-01-01' AND '9998-12-31' THEN {column}::timestamp AT TIME ZONE 'UTC'
         WHEN ((({column} - interval '25 h') AT TIME ZONE {zone}) + interval '25 h') AT TIME ZONE {zone} = {column}
             THEN (({column} - interval '25 h') AT TIME ZONE {zone}) + interval '25 h'
         ELSE (({column} + interval '25 h') AT TIME ZONE {zone}) - interval '25 h' END"""

_LATEST: LiteralString = """
    CASE WHEN {column} NOT BETWEEN '0002-01-01' AND '9998-12-31' THEN {column}::timestamp AT TIME ZONE 'UTC'
         ELSE {column}::timestamp AT TIME ZONE {zone} END"""

_NONE_EARLIER_FROM: LiteralString = """
    greatest(({instant}) AT TIME ZONE {zone},
             (({instant}) - interval '25 h') AT TIME ZONE {zone} + interval '25 h',
             (({instant}) + interval '25 h') AT TIME ZONE {zone} - interval '25 h')"""

# The first time that is not over at `at`. A clock shows the least of what it will ever show again now or right after it
# is set back, which happens on a whole minute. `skipped` is what it would show now if it had not been set forward.
_FIRST_NOT_OVER = """
    SELECT min(shown)::text FROM (SELECT %(at)s::timestamptz AS at) AS bound, LATERAL (
        SELECT greatest(at, date_trunc('minute', at) + n * interval '1 minute') AT TIME ZONE %(zone)s AS shown
        FROM generate_series(0, 25 * 60) AS n
        UNION ALL
        SELECT skipped FROM (SELECT (at - interval '25 h') AT TIME ZONE %(zone)s + interval '25 h' AS skipped) AS before
        WHERE skipped AT TIME ZONE %(zone)s >= at) AS shown"""


@dataclass(frozen=True)
class TimeColumn:
    """How a column holds times: those of the wall clocks of `zone`, or instants if that is None."""

    zone: str | None = None

    @classmethod
    def of(cls, connection: Connection, column_type: str, zone: str) -> Self:
        """Return how a column of this type holds times; `zone` is that of columns without one (a date has none either).

        Raises SchemaProblem where the column needs the zone and the server does not know it.
        """
        if column_type == catalog.INSTANT:
            return cls()
        require_zone(connection, zone)
        return cls(zone)

    @property
    def type(self) -> sql.SQL:
        """The type of what the column is compared with, so that an index on it serves the comparison."""
        return sql.SQL("timestamptz" if self.zone is None else "timestamp")

    def first_not_over(self, connection: Connection, instant: str) -> str:
        """Return a bound: every time in the column that is less has passed at `instant`, by each of its readings.

        Every time that has passed is less, with one exception: in the hour after a clock was set forward, the times
        shown since the change are not less, because those in the skipped hour may not have passed.
        """
        if self.zone is None:
            return instant
        bound: str = single(connection, _FIRST_NOT_OVER, {"at": instant, "zone": self.zone})[0]
        return bound

    def none_earlier_from(self, instant: LiteralString) -> sql.Composable:
        """Return a bound for the index: whatever in the column is not less has no reading before `instant`."""
        return self._composed(_NONE_EARLIER_FROM, instant=instant) or sql.SQL(instant)

    def earliest(self, column: LiteralString) -> sql.Composable:
        """Return the instant that a value of the column means, the earliest if it has two readings."""
        return self._composed(_EARLIEST, column=column) or sql.SQL(column)

    def latest(self, column: LiteralString) -> sql.Composable:
        """Return the instant that a value of the column means, the latest if it has two readings."""
        return self._composed(_LATEST, column=column) or sql.SQL(column)

    def stored(self, instant: LiteralString) -> sql.Composable:
        """Return what the column holds for an instant. Its earliest reading is never after the instant."""
        return self._composed("(({instant}) AT TIME ZONE {zone})", instant=instant) or sql.SQL(instant)

    def _composed(self, text: LiteralString, **parts: LiteralString) -> sql.Composed | None:
        if self.zone is None:
            return None
        return sql.SQL(text).format(
            zone=sql.Literal(self.zone), **{name: sql.SQL(part) for name, part in parts.items()}
        )


WITH_ZONE = TimeColumn()


def require_zone(connection: Connection, zone: str) -> None:
    """Raise SchemaProblem if the server's own time zone database does not have the zone."""
    try:
        connection.execute("SELECT now() AT TIME ZONE %s", [zone])
    except pg.InvalidParameterValue:
        raise SchemaProblem(
            f'this PostgreSQL does not know the zone "{zone}" of database.naive_timestamps; update the '
            "time zones of its machine (tzdata), or name a zone of pg_timezone_names with the same clocks"
        ) from None
