"""The rows of "ActiveOauths": which of them are due, and which of those may be asked for now."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

from psycopg import sql

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Connection, single
from catfeeder_cron.job import JobContext

# How long others keep away from a row whose request may have been acted on, without an answer to tell of it. That is
# the time that the process has which sent it, if it is only cut off from the database or being restarted.
IN_DOUBT = timedelta(minutes=10)

# What is written, or read, when an answer has come in.

HASH: LiteralString = "sha256(convert_to(a.refresh_link, 'UTF8'))"

# An empty refresh token or a lifespan of 0 says that there is nothing to renew.
RENEWABLE: LiteralString = "a.refresh_link <> '' AND coalesce(a.token_lifespan, 1) <> 0"

# The margin is capped at a quarter of the token's life. least() keeps the product within an interval's range. The first
# condition follows from the second and serves the index.
EXPIRES: LiteralString = """
    a.token_expiration < %(next_run)s::timestamptz + %(margin)s
    AND a.token_expiration < %(next_run)s::timestamptz + CASE WHEN a.token_lifespan > 0
        THEN least(%(margin)s, least(a.token_lifespan, 315360000) * interval '0.25 s') ELSE %(margin)s END"""

# A token that lives so short a time that it is due again as soon as it has been renewed: once in a round is enough.
RENEWED: LiteralString = "(t.held = {hash} AND t.sent_at >= %(round_began)s) IS TRUE"

# Not: a row that a process has under its lease; that was sent to the provider without a known end; that backs off;
# whose refresh token is dead; that has had its turn in this round. `t` is a row of oauth_tokens, if any.
FREE: LiteralString = """
    (t.lease_until IS NULL OR t.lease_until <= now())
    AND (t.sent IS NULL OR t.sent_at <= now() - %(in_doubt)s OR t.sent <> {hash})
    AND (t.not_before IS NULL OR t.not_before <= now())
    AND (t.dead IS NULL OR t.dead <> {hash})
    AND (t.sent_at IS NULL OR t.sent_at < %(round_began)s)"""

# When a token was handed out, whoever stored it. The bounds keep the product within an interval's range.
ISSUED: LiteralString = """
    (a.token_expiration - greatest(0, least(a.token_lifespan, 3153600000)) * interval '1 s')::timestamptz"""

# Dead ones are not due: they wait for their user, whatever we do.
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


# What a dry run finds before the daemon's schema was created.
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
    """When the first of those that back off may be asked for."""

    def why_not_free(self) -> str | None:
        """Say why rows are left alone."""
        told = [f"{self.leased} are in another run's hands"] if self.leased else []
        if self.next_try:
            told.append(f"{self.backing_off} back off after a failure, the first until {self.next_try:%H:%M:%S} UTC")
        if self.in_doubt:
            told.append(
                f"{self.in_doubt} were sent, with no known answer, and rest for at most {IN_DOUBT.seconds // 60} min"
            )
        return "; ".join(told) or None


@dataclass(frozen=True)
class Links:
    tables: DatabaseTables

    def statement(self, text: LiteralString, **parts: sql.Composable) -> sql.Composed:
        """Fill the names of the tables and the conditions of this module into a statement."""
        names = {
            "active": self._table(self.tables.active_oauths),
            "services": self._table(self.tables.services),
            "providers": self._table(self.tables.user_oauth_connection),
            "hash": sql.SQL(HASH),
            "renewable": sql.SQL(RENEWABLE),
            "expires": sql.SQL(EXPIRES),
            "free": sql.SQL(FREE).format(hash=sql.SQL(HASH)),
            "renewed": sql.SQL(RENEWED).format(hash=sql.SQL(HASH)),
            "issued": sql.SQL(ISSUED),
        }
        return sql.SQL(text).format(**names, **parts)

    def count(self, connection: Connection, window: "Window") -> list[Due]:
        """Count what is due, by provider, and has not been renewed in this round."""
        (exists,) = single(connection, "SELECT to_regclass('catfeeder_cron.oauth_tokens') IS NOT NULL")
        state = sql.SQL("catfeeder_cron.oauth_tokens" if exists else _NO_STATE)
        statement = self.statement(_COUNT, state=state)
        return [Due(*row) for row in connection.execute(statement, window.parameters())]

    def _table(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.tables.schema_, name)


@dataclass(frozen=True)
class Window:
    """What expires before `next_run` plus `margin` is due."""

    next_run: datetime
    margin: timedelta
    round_began: datetime
    """What was sent since then has had its turn: the slot, for which several daemons work, or the run's beginning."""

    def parameters(self) -> dict[str, Any]:
        return {
            "next_run": self.next_run,
            "margin": self.margin,
            "round_began": self.round_began,
            "in_doubt": IN_DOUBT,
        }


def window(context: JobContext, margin: timedelta, jitter: timedelta) -> Window:
    """Return what has to be renewed now, so that no token ends before the next run has begun.

    The slot of this run may still lie ahead on the database's clock, and must not be taken for the next one: the later
    of the two clocks counts.
    """
    with context.transaction() as connection:
        began, now = single(connection, "SELECT now(), greatest(now(), %s)", [datetime.now(UTC)])
    next_slot = context.schedule.next_after(now) if context.schedule else None
    round_began = min(context.slot, began) if context.slot else began
    return Window(next_slot + jitter if next_slot else now, margin, round_began)
