"""Claim due rows under a lease, and give back the rows that were not sent."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from psycopg import sql

from catfeeder_cron.database import Database, single
from catfeeder_cron.database.lineage import IS_CURRENT, Lineage
from catfeeder_cron.job import JobContext
from catfeeder_cron.renewal.links import FREE, Links, Window
from catfeeder_cron.times import elapsed_seconds

# `due` locks the rows, `claimed` writes their leases. Two guards keep a row from being claimed twice: the lock on it,
# and the condition on the conflict, because the snapshot in which a row of oauth_tokens looks free may be older than
# another process's claim. Each call goes on after the last row of the call before, so a pass meets a row that can't be
# claimed only once; rows that have failed come after all others. So neither starve the rest, even where a run ends at
# the first twenty tokens that are called dead. The order is the index's, also for rows without an expiry. The position
# is passed as text, because a timestamp may be infinite. A server that lost its last seconds hands out nothing: its
# rows may hold refresh tokens that are spent.
_CLAIM = """
    WITH due AS MATERIALIZED (
        SELECT a.id, a.token_expiration, {hash} AS hash
        FROM {active} a JOIN {services} s ON s.id = a.service_id
        LEFT JOIN catfeeder_cron.oauth_tokens t ON t.oauth_id = a.id
        WHERE s.name = %(provider)s AND {renewable} AND {place} AND {free} AND {current}
          AND (coalesce(t.failures, 0) > 0) = %(failed)s
          AND NOT EXISTS (SELECT FROM catfeeder_cron.oauth_providers p WHERE p.provider = %(provider)s
                          AND p.fingerprint = %(fingerprint)s AND p.paused_until > now())
        ORDER BY a.token_expiration, a.id LIMIT %(limit)s
        FOR NO KEY UPDATE OF a SKIP LOCKED),
    claimed AS (
        INSERT INTO catfeeder_cron.oauth_tokens AS t (oauth_id, owner, lease_until, sent, sent_at)
        SELECT id, %(owner)s, now() + %(lease)s, hash, now() FROM due
        ON CONFLICT (oauth_id) DO UPDATE SET owner = excluded.owner, lease_until = excluded.lease_until,
            sent = excluded.sent, sent_at = excluded.sent_at, refused = NULL, refused_by = NULL
        WHERE {free_now}
        RETURNING oauth_id)
    SELECT due.id, due.token_expiration::text, claimed.oauth_id IS NOT NULL
    FROM due LEFT JOIN claimed ON claimed.oauth_id = due.id ORDER BY due.token_expiration, due.id"""

# Read in the claim's transaction, which holds the rows' locks: the token that will be sent is the one in the row, and
# it is marked as sent before any other session can change the row.
_READ = """
    SELECT a.id, a.refresh_link, t.sent FROM {active} a JOIN catfeeder_cron.oauth_tokens t ON t.oauth_id = a.id
    WHERE a.id = ANY (%(ids)s) AND t.owner = %(owner)s AND t.sent = {hash}"""

_BY_EXPIRY = "{expires} AND (a.token_expiration, a.id) > (%(expiry)s::{time}, %(id)s)"
_UNKNOWN_EXPIRY = "a.token_expiration IS NULL AND a.id > %(id)s"

_RELEASE = """
    UPDATE catfeeder_cron.oauth_tokens SET owner = NULL, lease_until = NULL, sent = NULL, sent_at = NULL
    WHERE oauth_id = ANY (%(ids)s) AND owner = %(owner)s"""

_FREE_LEASES = """
    UPDATE catfeeder_cron.oauth_tokens SET owner = NULL, lease_until = NULL, sent = NULL, sent_at = NULL
    WHERE owner = %(owner)s"""

_BEFORE_ALL_IDS = -(2**63)


@dataclass(frozen=True)
class TokenClaim:
    """A row that this run has claimed. `claimed_at` is in `elapsed_seconds`, taken before the lease began."""

    id: int
    refresh_token: str = field(repr=False)
    sent: bytes
    """The hash of the refresh token."""
    claimed_at: float

    def good_for(self, lease: timedelta) -> float:
        """Return for how many seconds at least the lease still lasts."""
        return lease.total_seconds() - (elapsed_seconds() - self.claimed_at)


@dataclass
class Claimer:
    """Claims each due row of one provider once, in the order of their expiry; rows that have failed come last.

    Not safe under concurrency: one task calls it, each time in a thread.
    """

    links: Links
    window: Window
    owner: UUID
    lease: timedelta
    provider: str
    fingerprint: bytes
    lineage: Lineage | None = None
    """The history of the database that this run works on; None if that is not known."""
    _failed: bool = False
    _expiry: str | None = "-infinity"
    _id: int = _BEFORE_ALL_IDS

    def begin_again(self) -> None:
        """Go back to the oldest row. A row that has had its turn in this round is not claimed again."""
        self._failed, self._expiry, self._id = False, "-infinity", _BEFORE_ALL_IDS

    def claim(self, context: JobContext, limit: int) -> list[TokenClaim]:
        """Return up to `limit` rows; none when there is nothing left to claim. Raises JobInterrupted."""
        while True:
            met, claims = self._claim(context, limit)
            if claims:
                return claims
            if not met and self._expiry is None and self._failed:
                return []
            if not met:
                # Rows that expire at an unknown time come last, and after them the rows that have failed.
                self._failed = self._failed or self._expiry is None
                self._expiry = "-infinity" if self._expiry is None else None
                self._id = _BEFORE_ALL_IDS

    def _claim(self, context: JobContext, limit: int) -> tuple[int, list[TokenClaim]]:
        parameters = {
            **self.window.parameters(),
            "provider": self.provider,
            "fingerprint": self.fingerprint,
            "owner": self.owner,
            "lease": self.lease,
            "limit": limit,
            "failed": self._failed,
            "expiry": self._expiry,
            "id": self._id,
            **_parameters(self.lineage, context.database),
        }
        begun = elapsed_seconds()
        with context.transaction() as connection:
            met = connection.execute(self._statement(), parameters).fetchall()
            ids = [id for id, _, is_ours in met if is_ours]
            if not ids:
                rows = []
            else:
                mine = {"ids": ids, "owner": self.owner}
                rows = connection.execute(self.links.statement(_READ), mine).fetchall()
        if met:
            self._id, self._expiry, _ = met[-1]
        order = {id: place for place, id in enumerate(ids)}
        rows.sort(key=lambda row: order[row[0]])
        return len(met), [TokenClaim(id, refresh_token, sent, begun) for id, refresh_token, sent in rows]

    def _statement(self) -> sql.Composed:
        known = self._expiry is not None
        return self.links.statement(
            _CLAIM,
            place=sql.SQL(_BY_EXPIRY).format(expires=self.links.expires(), time=self.links.expiry.type)
            if known
            else sql.SQL(_UNKNOWN_EXPIRY),
            current=sql.SQL(IS_CURRENT if self.lineage else "true"),
            free_now=sql.SQL(FREE).format(hash=sql.SQL("excluded.sent")),
        )


def is_current(context: JobContext, lineage: Lineage | None) -> bool:
    """Tell whether the database still has the history that a run works on, and has lost nothing since."""
    if lineage is None:
        return True
    with context.database.transaction() as connection:
        (current,) = single(connection, f"SELECT {IS_CURRENT}", _parameters(lineage, context.database))
    return bool(current)


def _parameters(lineage: Lineage | None, database: Database) -> dict[str, Any]:
    """Return the parameters of IS_CURRENT, as of the last heartbeat that met the same history."""
    latest = database.lineage
    if lineage and latest and latest.id == lineage.id:
        lineage = latest
    return lineage.parameters() if lineage else {}


def release(database: Database, owner: UUID, ids: list[int]) -> None:
    """End the leases of rows that were claimed and not sent."""
    if ids:
        database.execute(_RELEASE, {"owner": owner, "ids": ids})


def free_leases(database: Database, owner: UUID) -> int:
    """End the leases of a dead process whose answers are stored; return how many rows they were on."""
    return database.execute(_FREE_LEASES, {"owner": owner})
