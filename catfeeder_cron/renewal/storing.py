"""Put answers into the database: tokens into their rows, verdicts into the daemon's own schema."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, LiteralString
from uuid import UUID

from psycopg import sql

from catfeeder_cron.database import Connection, Database
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, LockTimeout, StatementTimeout
from catfeeder_cron.renewal.journal import Entry
from catfeeder_cron.renewal.links import Links

# How long a batch waits for one row that somebody else has locked.
_LOCK_TIMEOUT = "500ms"

_ENTRIES: LiteralString = """
    unnest(%(ids)s::bigint[], %(sent)s::bytea[], %(tokens)s::text[], %(refresh_tokens)s::text[],
           %(lifespans)s::bigint[], %(said)s::boolean[], %(refresh_lifespans)s::bigint[], %(ages)s::float8[])
        AS n(id, sent, token, refresh_token, lifespan, said, refresh_lifespan, age)"""

# By value: only the row that still holds the token that was sent. A newer login is never overwritten, and an answer
# that comes late still lands. The time that has passed since the question is taken off the token's life.
_STORE = """
    WITH before AS MATERIALIZED (
        SELECT a.id, {issued} AS issued_at FROM {active} a WHERE a.id = ANY (%(ids)s)),
    stored AS (
        UPDATE {active} a SET
            token = coalesce(n.token, a.token),
            refresh_link = coalesce(n.refresh_token, a.refresh_link),
            token_expiration = CASE WHEN n.token IS NULL THEN a.token_expiration
                                    ELSE now() + (n.lifespan - n.age) * interval '1 s' END,
            token_lifespan = CASE WHEN n.said THEN n.lifespan ELSE a.token_lifespan END
        FROM {entries}
        WHERE a.id = n.id AND {hash} = n.sent
        RETURNING a.id)
    SELECT stored.id, before.issued_at::text FROM stored JOIN before USING (id)"""

_BACK_OFF: LiteralString = "least(3600, 30 * 2 ^ least(t.failures, 10)) * (0.75 + random() / 2) * interval '1 s'"

# For an answer that was not stored, because the row is gone or holds a newer login, only the lease goes. One without
# a token, that of a partial answer, is a failure. `sent_at` stays: it tells when the row had its turn.
_AFTER_STORE = """
    UPDATE catfeeder_cron.oauth_tokens t SET
        owner = NULL, lease_until = NULL, sent = NULL,
        failures = CASE WHEN is_stored AND n.token IS NULL THEN t.failures + 1 ELSE 0 END,
        not_before = CASE WHEN is_stored AND n.token IS NULL THEN now() + {back_off} END,
        refused = NULL, refused_by = NULL, dead = NULL, dead_since = NULL,
        held = CASE WHEN NOT is_stored THEN t.held
                    WHEN n.refresh_token IS NULL THEN n.sent ELSE sha256(convert_to(n.refresh_token, 'UTF8')) END,
        consented_at = CASE WHEN NOT is_stored OR t.held = n.sent THEN t.consented_at
                            ELSE coalesce(issued_at, now()) END,
        refresh_expires_at = CASE
            WHEN NOT is_stored THEN t.refresh_expires_at
            WHEN n.refresh_lifespan IS NOT NULL THEN now() + (n.refresh_lifespan - n.age) * interval '1 s'
            WHEN n.refresh_token IS NULL AND t.held = n.sent THEN t.refresh_expires_at END
    FROM {entries} LEFT JOIN unnest(%(stored)s::bigint[], %(issued)s::timestamptz[]) AS s(id, issued_at) USING (id),
        LATERAL (SELECT s.id IS NOT NULL AS is_stored) known
    WHERE t.oauth_id = n.id AND t.sent = n.sent"""

# Rows whose answer the table refuses: asking again would only lose the token that is in the journal.
_HOLD_BACK = """
    UPDATE catfeeder_cron.oauth_tokens SET not_before = now() + interval '1 day', failures = failures + 1
    WHERE oauth_id = %(id)s"""

# A refresh token that was called dead is so only if the row still holds it: else somebody else has renewed it.
_SETTLE = """
    UPDATE catfeeder_cron.oauth_tokens t SET
        owner = NULL, lease_until = NULL,
        sent = CASE WHEN n.in_doubt THEN t.sent END,
        sent_at = CASE WHEN n.in_doubt THEN now() END,
        failures = t.failures + n.failed::int,
        not_before = CASE WHEN n.failed THEN now() + {back_off} END,
        refused = CASE WHEN n.dead THEN n.sent END,
        refused_by = CASE WHEN n.dead AND EXISTS (SELECT FROM {active} a WHERE a.id = n.id AND {hash} = n.sent)
                          THEN n.lane END
    FROM unnest(%(ids)s::bigint[], %(sent)s::bytea[], %(dead)s::boolean[], %(failed)s::boolean[],
                %(in_doubt)s::boolean[], %(lanes)s::uuid[]) AS n(id, sent, dead, failed, in_doubt, lane)
    WHERE t.oauth_id = n.id AND t.sent = n.sent"""

_CONFIRM = """
    UPDATE catfeeder_cron.oauth_tokens
    SET dead = refused, dead_since = now(), refused = NULL, refused_by = NULL, failures = 0
    WHERE oauth_id IN (SELECT oauth_id FROM catfeeder_cron.oauth_tokens WHERE refused_by = %(lane)s
                       ORDER BY oauth_id LIMIT 500)
    RETURNING oauth_id"""

_DISMISS = """
    UPDATE catfeeder_cron.oauth_tokens t
    SET refused = NULL, refused_by = NULL, failures = t.failures + 1, not_before = now() + {back_off}
    WHERE refused_by = %(lane)s"""


@dataclass(frozen=True)
class Verdict:
    """What came of a request that brought no token. None of `dead`, `failed`, `in_doubt`: it is not the row's fault."""

    id: int
    sent: bytes
    lane: UUID
    dead: bool = False
    failed: bool = False
    in_doubt: bool = False


@dataclass
class Stored:
    """What became of answers: in their rows; too late for a row that is gone or has a new login; for later; refused."""

    stored: list[Entry] = field(default_factory=list)
    outdated: list[Entry] = field(default_factory=list)
    locked: list[Entry] = field(default_factory=list)
    refused: list[tuple[Entry, str]] = field(default_factory=list)

    def add(self, other: "Stored") -> None:
        self.stored += other.stored
        self.outdated += other.outdated
        self.locked += other.locked
        self.refused += other.refused


def store(database: Database, links: Links, entries: Sequence[Entry], now: float) -> Stored:
    """Store answers; `now` is the wall clock's. Raises DatabaseUnavailable, and then all may be tried again.

    An answer that its row can't take, or whose row is locked, holds up no other.
    """
    if not entries:
        return Stored()
    try:
        with database.transaction(lock_timeout=_LOCK_TIMEOUT) as connection:
            return _store(connection, links, entries, now)
    except DatabaseUnavailable:
        raise
    except (LockTimeout, StatementTimeout):
        if len(entries) == 1:
            return Stored(locked=[entries[0]])
    except DatabaseError as error:
        if len(entries) == 1:
            database.execute(_HOLD_BACK, {"id": entries[0].id})
            return Stored(refused=[(entries[0], str(error))])
    outcome = Stored()
    for entry in entries:
        outcome.add(store(database, links, [entry], now))
    return outcome


def settle(database: Database, links: Links, verdicts: Sequence[Verdict]) -> None:
    """Record verdicts, and end the leases of their rows. Raises DatabaseError."""
    if not verdicts:
        return
    parameters = {
        "ids": [each.id for each in verdicts],
        "sent": [each.sent for each in verdicts],
        "dead": [each.dead for each in verdicts],
        "failed": [each.failed for each in verdicts],
        "in_doubt": [each.in_doubt for each in verdicts],
        "lanes": [each.lane for each in verdicts],
    }
    with database.transaction() as connection:
        connection.execute(links.statement(_SETTLE, back_off=sql.SQL(_BACK_OFF)), parameters)


def confirm_dead(database: Database, lane: UUID) -> list[int]:
    """Make up to 500 of the rows that this lane's provider has called dead wait for a new login; return which."""
    return [id for (id,) in database.query(_CONFIRM, {"lane": lane})]


def dismiss_dead(database: Database, lane: UUID) -> None:
    """Blame nobody after all; the rows back off, and let those go first whose tokens may be good."""
    with database.transaction() as connection:
        connection.execute(sql.SQL(_DISMISS).format(back_off=sql.SQL(_BACK_OFF)), {"lane": lane})


def _store(connection: Connection, links: Links, entries: Sequence[Entry], now: float) -> Stored:
    parameters: dict[str, Any] = {
        "ids": [entry.id for entry in entries],
        "sent": [bytes.fromhex(entry.sent) for entry in entries],
        "tokens": [entry.token for entry in entries],
        "refresh_tokens": [entry.refresh_token for entry in entries],
        "lifespans": [entry.lifespan for entry in entries],
        "said": [entry.lifespan_is_said for entry in entries],
        "refresh_lifespans": [entry.refresh_lifespan for entry in entries],
        "ages": [max(0.0, now - entry.asked_at) for entry in entries],
    }
    parts = sql.SQL(_ENTRIES)
    stored: dict[int, str | None] = dict(connection.execute(links.statement(_STORE, entries=parts), parameters))
    parameters |= {"stored": list(stored), "issued": list(stored.values())}
    after = links.statement(_AFTER_STORE, entries=parts, back_off=sql.SQL(_BACK_OFF))
    connection.execute(after, parameters)
    return Stored(
        stored=[entry for entry in entries if entry.id in stored],
        outdated=[entry for entry in entries if entry.id not in stored],
    )
