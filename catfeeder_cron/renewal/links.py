"""Find the rows of "ActiveOauths" that are due, and those of them that may be sent now."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, LiteralString, Self

from psycopg import sql

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Connection, Database, single
from catfeeder_cron.database.catalog import find_table
from catfeeder_cron.database.time_columns import TimeColumn
from catfeeder_cron.job import JobContext

# How long other processes leave a row alone whose request may have been acted on without a known answer. In this time
# the process that sent it can still store the answer, if it was only cut off from the database or restarted.
IN_DOUBT = timedelta(minutes=10)

HASH: LiteralString = "sha256(convert_to(a.refresh_link, 'UTF8'))"

# An empty refresh token or a lifespan of 0 says that there is nothing to renew.
RENEWABLE: LiteralString = "a.refresh_link <> '' AND coalesce(a.token_lifespan, 1) <> 0"

# The margin is at most a quarter of the token's lifespan. least() keeps the product within an interval's range. The
# first condition follows from the second; it is there because an index can serve it. In a column without a zone, the
# earlier reading of a time counts, so that no token is renewed too late.
EXPIRES: LiteralString = """
    a.token_expiration < {horizon}
    AND {ends} < %(next_run)s::timestamptz + CASE WHEN a.token_lifespan > 0
        THEN least(%(margin)s, least(a.token_lifespan, 315360000) * interval '0.25 s') ELSE %(margin)s END"""

# A token with a very short lifespan is due again as soon as it has been renewed: once in a round is enough.
RENEWED: LiteralString = "(t.held = {hash} AND t.sent_at >= %(round_began)s) IS TRUE"

# Excludes a row that is under a lease; that was sent to the provider without a known answer; that backs off; whose
# refresh token is dead; that has had its turn in this round. `t` is the link's row of oauth_tokens, if there is one.
FREE: LiteralString = """
    (t.lease_until IS NULL OR t.lease_until <= now())
    AND (t.sent IS NULL OR t.sent_at <= now() - %(in_doubt)s OR t.sent <> {hash})
    AND (t.not_before IS NULL OR t.not_before <= now())
    AND (t.dead IS NULL OR t.dead <> {hash})
    AND (t.sent_at IS NULL OR t.sent_at < %(round_began)s)"""

# When the provider handed out the token, no matter which program stored it. The bounds keep the product within an
# interval's range.
ISSUED: LiteralString = "({ends} - greatest(0, least(a.token_lifespan, 3153600000)) * interval '1 s')"

# Links with a dead refresh token are not due: only their user can help.
_COUNT = """
    SELECT p.provider_name, s.name, count(*),
           count(*) FILTER (WHERE t.lease_until > now()), count(*) FILTER (WHERE {free}),
           count(*) FILTER (WHERE t.sent = {hash} AND (t.lease_until IS NULL OR t.lease_until <= now())
                                  AND (t.not_before IS NULL OR t.not_before <= now())),
           count(*) FILTER (WHERE t.not_before > now()), min(t.not_before) FILTER (WHERE t.not_before > now())
    FROM {active} a LEFT JOIN {services} s ON s.id = a.service_id
    LEFT JOIN {providers} p ON p.provider_name = s.name
    LEFT JOIN {state} t ON t.oauth_id = a.id
    WHERE {renewable} AND ({expires} OR a.token_expiration IS NULL) AND (t.dead IS NULL OR t.dead <> {hash})
      AND NOT {renewed}
    GROUP BY p.provider_name, s.name ORDER BY s.name"""


# Stands for oauth_tokens in a dry run before the daemon's schema was created.
_NO_STATE = """
    (SELECT NULL::bigint AS oauth_id, NULL::timestamptz AS lease_until, NULL::bytea AS sent,
            NULL::timestamptz AS sent_at, NULL::timestamptz AS not_before, NULL::bytea AS dead, NULL::bytea AS held
     WHERE false)"""


@dataclass(frozen=True)
class Due:
    """How many rows of one provider are due: `leased` by some process, `free`, `in_doubt`, `backing_off`."""

    provider: str | None
    service: str | None
    rows: int
    leased: int
    free: int
    in_doubt: int
    backing_off: int
    next_try: datetime | None
    """When the first of the rows that back off may be sent."""

    def why_not_free(self) -> str | None:
        """Say why some of the rows may not be sent now; None if all may."""
        parts = [f"{self.leased} are in another run's hands"] if self.leased else []
        if self.next_try:
            parts.append(f"{self.backing_off} back off after a failure, the first until {self.next_try:%H:%M:%S} UTC")
        if self.in_doubt:
            parts.append(
                f"{self.in_doubt} were sent, with no known answer, and rest for at most {IN_DOUBT.seconds // 60} min"
            )
        return "; ".join(parts) or None


@dataclass(frozen=True)
class Links:
    """The table of links and the tables beside it, by their configured names."""

    tables: DatabaseTables
    expiry: TimeColumn
    """How `token_expiration` holds times."""

    @classmethod
    def find(cls, database: Database, tables: DatabaseTables) -> Self:
        """Return the links, with the type of their expiry. Raises SchemaProblem where there is no such table."""
        with database.transaction() as connection:
            _, column_type = find_table(connection, tables.schema_, tables.active_oauths, "token_expiration")
            return cls(tables, TimeColumn.of(connection, column_type, database.naive_timestamps))

    def statement(self, text: LiteralString, **parts: sql.Composable) -> sql.Composed:
        """Return the statement with the names of the tables and the conditions of this module filled in."""
        ends = self.expiry.earliest("a.token_expiration")
        names = {
            "active": self._table(self.tables.active_oauths),
            "services": self._table(self.tables.services),
            "providers": self._table(self.tables.user_oauth_connection),
            "hash": sql.SQL(HASH),
            "renewable": sql.SQL(RENEWABLE),
            "ends": ends,
            "time": self.expiry.type,
            "expires": self.expires(),
            "free": sql.SQL(FREE).format(hash=sql.SQL(HASH)),
            "renewed": sql.SQL(RENEWED).format(hash=sql.SQL(HASH)),
            "issued": sql.SQL(ISSUED).format(ends=ends),
        }
        return sql.SQL(text).format(**names, **parts)

    def expires(self) -> sql.Composed:
        """Return the condition that a link's token ends in a run's window."""
        horizon = self.expiry.none_earlier_from("%(next_run)s::timestamptz + %(margin)s")
        return sql.SQL(EXPIRES).format(horizon=horizon, ends=self.expiry.earliest("a.token_expiration"))

    def count(self, connection: Connection, window: "Window") -> list[Due]:
        """Count the due rows of each provider that were not renewed in this round."""
        (exists,) = single(connection, "SELECT to_regclass('catfeeder_cron.oauth_tokens') IS NOT NULL")
        state = sql.SQL("catfeeder_cron.oauth_tokens" if exists else _NO_STATE)
        statement = self.statement(_COUNT, state=state)
        return [Due(*row) for row in connection.execute(statement, window.parameters())]

    def _table(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.tables.schema_, name)


@dataclass(frozen=True)
class Window:
    """The time that a run covers: a token that expires before `next_run` plus `margin` is due."""

    next_run: datetime
    margin: timedelta
    round_began: datetime
    """Rows that were sent since then have had their turn. It is the run's slot, for which several daemons may work, or
    the beginning of a run without a slot."""

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the conditions of this module."""
        return {
            "next_run": self.next_run,
            "margin": self.margin,
            "round_began": self.round_began,
            "in_doubt": IN_DOUBT,
        }


def window(context: JobContext, margin: timedelta, jitter: timedelta) -> Window:
    """Return the window of a run that renews every token that would end before the next run has begun.

    The database's clock counts, whatever this machine's clock shows. A run may begin a moment before its slot by that
    clock; the slot must then not be taken for the next one.
    """
    with context.transaction() as connection:
        (now,) = single(connection, "SELECT now()")
    slot = context.slot or now
    next_slot = context.schedule.next_after(max(slot, now)) if context.schedule else None
    return Window(next_slot + jitter if next_slot else now, margin, round_began=min(slot, now))
