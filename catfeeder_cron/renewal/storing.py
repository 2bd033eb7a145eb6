"""Store the tokens of answers in their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, LiteralString

from psycopg import sql

from catfeeder_cron.database import Connection, Database
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, LockTimeout, StatementTimeout
from catfeeder_cron.oauth.quoting import quote
from catfeeder_cron.renewal.entries import Entry
from catfeeder_cron.renewal.failures import BACK_OFF
from catfeeder_cron.renewal.links import Links

# How long a batch waits for a row that another session has locked, and then for each further one. Short, because a stop
# of the daemon waits for the batch.
_LOCK_TIMEOUT = "500ms"
_NEXT_LOCK_TIMEOUT = "10ms"

_ENTRIES: LiteralString = """
    unnest(%(ids)s::bigint[], %(sent)s::bytea[], %(tokens)s::text[], %(refresh_tokens)s::text[],
           %(lifespans)s::bigint[], %(said)s::boolean[], %(refresh_lifespans)s::bigint[], %(ages)s::float8[])
        AS n(id, sent, token, refresh_token, lifespan, said, refresh_lifespan, age)"""

_NEW_END: LiteralString = "now() + (n.lifespan - n.age) * interval '1 s'"

# The answer goes only into a row that still holds the token that was sent. So a newer login is never overwritten, and a
# late answer is still stored. The time since the request is subtracted from the token's lifespan. `before` reads the
# old issue time, because RETURNING shows the row after the update only.
_STORE = """
    WITH before AS MATERIALIZED (
        SELECT a.id, {issued} AS issued_at FROM {active} a WHERE a.id = ANY (%(ids)s)),
    stored AS (
        UPDATE {active} a SET
            token = coalesce(n.token, a.token),
            refresh_link = coalesce(n.refresh_token, a.refresh_link),
            token_expiration = CASE WHEN n.token IS NULL THEN a.token_expiration
                                    ELSE {new_end} END,
            token_lifespan = CASE WHEN n.said THEN n.lifespan ELSE a.token_lifespan END
        FROM {entries}
        WHERE a.id = n.id AND {hash} = n.sent
        RETURNING a.id)
    SELECT stored.id, before.issued_at::text FROM stored JOIN before USING (id)"""

# For an answer that was not stored, because the row is gone or holds a newer login, only the lease ends. An answer
# without a token (a partial one) counts as a failure. `sent_at` stays: it shows when the row had its turn. An answer
# that is stored `again` costs no turn, since nothing was sent. The server that lost the first store may have lost the
# claim before it, too: `held` then tells that the state is that of the token that was sent.
_AFTER_STORE = """
    UPDATE catfeeder_cron.oauth_tokens t SET
        owner = NULL, lease_until = NULL, sent = NULL,
        sent_at = CASE WHEN NOT (%(again)s AND is_stored) THEN t.sent_at END,
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
    WHERE t.oauth_id = n.id AND (t.sent = n.sent OR (%(again)s AND is_stored AND t.held = n.sent))"""

# The table refuses this row's answer: another request would only lose the token that is in the journal.
_HOLD_BACK = """
    UPDATE catfeeder_cron.oauth_tokens SET not_before = now() + interval '1 day', failures = failures + 1
    WHERE oauth_id = %(id)s"""

_KEEP_IN_DOUBT = """
    UPDATE catfeeder_cron.oauth_tokens t SET sent_at = now()
    FROM unnest(%(ids)s::bigint[], %(sent)s::bytea[]) AS n(id, sent) WHERE t.oauth_id = n.id AND t.sent = n.sent"""


@dataclass
class StoredAnswers:
    """The results of storing answers.

    `stored` are in their rows; `outdated` came too late, for a row that is gone or has a newer login; `locked` must be
    stored later; `refused` are those that the table does not accept, each with the reason.
    """

    stored: list[Entry] = field(default_factory=list)
    outdated: list[Entry] = field(default_factory=list)
    locked: list[Entry] = field(default_factory=list)
    refused: list[tuple[Entry, str]] = field(default_factory=list)

    def add(self, other: "StoredAnswers") -> None:
        """Add the results of further answers."""
        self.stored += other.stored
        self.outdated += other.outdated
        self.locked += other.locked
        self.refused += other.refused


def store(
    database: Database,
    links: Links,
    entries: Sequence[Entry],
    lock_timeout: str = _LOCK_TIMEOUT,
    *,
    again: bool = False,
) -> StoredAnswers:
    """Store answers, or store them `again` in rows that went back. Raises DatabaseUnavailable; it may be repeated then.

    An answer that is refused, or whose row is locked, does not keep the others from being stored.
    """
    if not entries:
        return StoredAnswers()
    try:
        with database.transaction(lock_timeout=lock_timeout) as connection:
            return _store(connection, links, entries, again=again)
    except DatabaseUnavailable:
        raise
    except (LockTimeout, StatementTimeout):
        if len(entries) == 1:
            return StoredAnswers(locked=[entries[0]])
    except DatabaseError as error:
        if len(entries) == 1:
            return StoredAnswers(refused=[(entries[0], _hold_back(database, entries[0], error))])
    outcome = StoredAnswers()
    for entry in entries:
        timeout = _NEXT_LOCK_TIMEOUT if outcome.locked else lock_timeout
        outcome.add(store(database, links, [entry], timeout, again=again))
    return outcome


def _hold_back(database: Database, entry: Entry, error: DatabaseError) -> str:
    """Leave the row alone for a day; return why it refuses its answer, without tokens, which a trigger may quote."""
    database.execute(_HOLD_BACK, {"id": entry.id})
    return quote(str(error), [secret for secret in (entry.token, entry.refresh_token) if secret])


def keep_in_doubt(database: Database, entries: Sequence[Entry]) -> None:
    """Keep every process from sending these rows again: their answers are in a journal, because the rows are locked."""
    if entries:
        parameters = {"ids": [each.id for each in entries], "sent": [bytes.fromhex(each.sent) for each in entries]}
        database.execute(_KEEP_IN_DOUBT, parameters)


def _store(connection: Connection, links: Links, entries: Sequence[Entry], *, again: bool) -> StoredAnswers:
    parameters: dict[str, Any] = {
        "ids": [entry.id for entry in entries],
        "sent": [bytes.fromhex(entry.sent) for entry in entries],
        "tokens": [entry.token for entry in entries],
        "refresh_tokens": [entry.refresh_token for entry in entries],
        "lifespans": [entry.lifespan for entry in entries],
        "said": [entry.lifespan_is_said for entry in entries],
        "refresh_lifespans": [entry.refresh_lifespan for entry in entries],
        "ages": [entry.age_seconds() for entry in entries],
        "again": again,
    }
    parts = sql.SQL(_ENTRIES)
    statement = links.statement(_STORE, entries=parts, new_end=links.expiry.stored(_NEW_END))
    stored: dict[int, str | None] = dict(connection.execute(statement, parameters))
    parameters |= {"stored": list(stored), "issued": list(stored.values())}
    after = links.statement(_AFTER_STORE, entries=parts, back_off=sql.SQL(BACK_OFF))
    connection.execute(after, parameters)
    return StoredAnswers(
        stored=[entry for entry in entries if entry.id in stored],
        outdated=[entry for entry in entries if entry.id not in stored],
    )
