"""Record answers without a token: their rows back off, are in doubt, come last, or wait for a new login."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg import sql

from catfeeder_cron.database import Database, single
from catfeeder_cron.renewal.links import IN_DOUBT, Links, Window

BACK_OFF: LiteralString = "least(3600, 30 * 2 ^ least(t.failures, 10)) * (0.75 + random() / 2) * interval '1 s'"

# A refresh token that the provider called dead counts as dead only if the row still holds it; else another process has
# renewed it. Its lease keeps other processes away until this run has confirmed or dismissed it. `sent_at` stays, as it
# does for stored answers: it shows that the row has had its turn.
_SETTLE = """
    UPDATE catfeeder_cron.oauth_tokens t SET
        owner = CASE WHEN is_dead THEN t.owner END,
        lease_until = CASE WHEN is_dead THEN now() + %(in_doubt)s END,
        sent = CASE WHEN n.in_doubt THEN t.sent END,
        sent_at = CASE WHEN n.in_doubt THEN now() ELSE t.sent_at END,
        failures = t.failures + (n.failed OR n.comes_last)::int,
        not_before = CASE WHEN n.failed THEN now() + {back_off} END,
        refused = CASE WHEN is_dead THEN n.sent END,
        refused_by = CASE WHEN is_dead THEN n.worker END
    FROM unnest(%(ids)s::bigint[], %(sent)s::bytea[], %(dead)s::boolean[], %(failed)s::boolean[],
                %(doubtful)s::boolean[], %(comes_last)s::boolean[], %(workers)s::uuid[])
            AS n(id, sent, dead, failed, in_doubt, comes_last, worker),
        LATERAL (SELECT n.dead AND EXISTS (SELECT FROM {active} a WHERE a.id = n.id AND {hash} = n.sent) AS is_dead) v
    WHERE t.oauth_id = n.id AND t.sent = n.sent AND t.owner = %(owner)s"""

# Counts the answers of all processes in the same round: each alone may have too few for a decision.
_CALLED_DEAD = """
    SELECT count(*) FILTER (WHERE t.refused IS NOT NULL OR t.dead_since >= %(round_began)s),
           count(*) FILTER (WHERE t.lease_until IS NULL OR t.refused IS NOT NULL)
    FROM catfeeder_cron.oauth_tokens t JOIN {active} a ON a.id = t.oauth_id JOIN {services} s ON s.id = a.service_id
    WHERE t.sent_at >= %(round_began)s AND s.name = %(provider)s"""

_CONFIRM = """
    UPDATE catfeeder_cron.oauth_tokens
    SET dead = refused, dead_since = now(), refused = NULL, refused_by = NULL, failures = 0,
        owner = NULL, lease_until = NULL
    WHERE oauth_id IN (SELECT oauth_id FROM catfeeder_cron.oauth_tokens WHERE refused_by = %(worker)s
                       ORDER BY oauth_id LIMIT 500)
    RETURNING oauth_id"""

# `refused` stays, so that the row still counts as called dead in this round.
_DISMISS = """
    UPDATE catfeeder_cron.oauth_tokens t
    SET refused_by = NULL, failures = t.failures + 1, not_before = now() + {back_off}, owner = NULL, lease_until = NULL
    WHERE refused_by = %(worker)s"""


@dataclass(frozen=True)
class Failure:
    """A request that brought no token. Without any of the four marks, the row is not the cause."""

    id: int
    sent: bytes
    worker: UUID
    dead: bool = False
    failed: bool = False
    in_doubt: bool = False
    comes_last: bool = False
    """The row may be the cause, so the other rows go first."""


def settle(database: Database, links: Links, owner: UUID, failures: Sequence[Failure]) -> None:
    """Record failures and end the leases of their rows, except of those called dead. Raises DatabaseError."""
    if not failures:
        return
    parameters = {
        "owner": owner,
        "in_doubt": IN_DOUBT,
        "ids": [each.id for each in failures],
        "sent": [each.sent for each in failures],
        "dead": [each.dead for each in failures],
        "failed": [each.failed for each in failures],
        "doubtful": [each.in_doubt for each in failures],
        "comes_last": [each.comes_last for each in failures],
        "workers": [each.worker for each in failures],
    }
    with database.transaction() as connection:
        connection.execute(links.statement(_SETTLE, back_off=sql.SQL(BACK_OFF)), parameters)


def called_dead(database: Database, links: Links, provider: str, window: Window) -> tuple[int, int]:
    """Return how many of a provider's answers in this round called a token dead, and how many there were."""
    parameters = {"provider": provider, "round_began": window.round_began}
    with database.transaction() as connection:
        dead, answers = single(connection, links.statement(_CALLED_DEAD), parameters)
    return dead, answers


def confirm_dead(database: Database, worker: UUID) -> list[int]:
    """Make up to 500 of the rows that this worker's provider has called dead wait for a new login; return which."""
    return [id for (id,) in database.query(_CONFIRM, {"worker": worker})]


def dismiss_dead(database: Database, worker: UUID) -> int:
    """Ask no user to log in again; the rows back off, so that other rows go first. Return how many they were."""
    with database.transaction() as connection:
        return connection.execute(sql.SQL(_DISMISS).format(back_off=sql.SQL(BACK_OFF)), {"worker": worker}).rowcount
