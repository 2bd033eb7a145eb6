"""Store the outcomes of attempts: each row's next state and a line in "ActionLog", if the row still has the lease."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from catfeeder_cron.actions.due.attempts import Finished
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.database import Connection
from catfeeder_cron.times import elapsed_seconds

_LONGEST_WAIT_SECONDS = 3600

# In "ActionLog": a process that has ended meanwhile, or can't be reached, may have done it. For others see put_back.
_MAY_BE_AGAIN = "it was due before the database lost its last seconds, and may have been done then, too"

# In one statement: `verdict` are the attempts, `held` locks their rows if they still have the lease, `next` finds when
# a repeated row is due again, `logged`, `remembered`, `forgotten` and `stored` write. A retry moves `due_at`, so
# action_retries keeps the slot of a row that repeats, and its grid does not shift. Only those multiples of repeat_every
# near now() are examined; an interval with months has no fixed length, so for it a few more are. A row that another
# session has locked is left for the next call. A cancelled row keeps its state.
_STORE = """
    WITH verdict AS (
        SELECT * FROM unnest(%(ids)s, %(owners)s::text[], %(verdicts)s::text[], %(details)s::text[],
                             %(waits)s::float8[], %(starts)s::text[], %(ages)s::float8[], %(known)s::bool[])
            AS v (id, owner, verdict, detail, wait, start, age, known)),
    held AS MATERIALIZED (
        SELECT a.id, a.state, a.attempts, a.repeat_every, v.start, v.age, v.known, v.detail,
               {due_of_a} AS due, coalesce(r.due_at, {due_of_a}) AS slot,
               now() + v.wait * interval '1 second' AS retry_at,
               CASE WHEN v.verdict = 'retried' AND a.attempts >= coalesce(a.max_attempts, 5) THEN 'failed'
                    ELSE v.verdict END AS verdict
        FROM verdict v JOIN {actions} a ON a.id = v.id AND a.lease_owner = v.owner
        LEFT JOIN catfeeder_cron.action_retries r
            ON a.repeat_every IS NOT NULL AND r.action = a.id::text AND {retry_shown} = a.due_at
        FOR UPDATE OF a SKIP LOCKED),
    next AS (
        SELECT held.*, CASE WHEN verdict = 'done' AND repeat_every > interval '0' AND isfinite(repeat_every)
                                 AND isfinite(slot) THEN (
            SELECT coalesce(min(slot + n * repeat_every) FILTER (WHERE slot + n * repeat_every > now()),
                            now() + repeat_every)
            FROM (SELECT floor(extract(epoch FROM now() - slot) / extract(epoch FROM repeat_every)) + 1 AS about,
                         extract(year FROM repeat_every) <> 0 OR extract(month FROM repeat_every) <> 0 AS months) AS e,
                 generate_series(greatest(1, about - CASE WHEN months THEN 2 + about / 20 ELSE 0 END)::bigint,
                                 greatest(1, about + CASE WHEN months THEN 2 + about / 20 ELSE 0 END)::bigint) AS n)
            END AS repeat_at
        FROM held),
    logged AS (
        INSERT INTO {action_log} (action_id, attempt, started_at, finished_at, outcome, detail)
        SELECT id, attempts, {started}, {finished}, verdict, nullif(concat_ws('; ', detail, (
                   SELECT %(again)s FROM catfeeder_cron.lineage
                   WHERE reason IS NOT NULL AND since > now() - interval '1 hour'
                     AND next.due <= since AND start::timestamptz > since)), '')
        FROM next WHERE NOT known),
    remembered AS (
        INSERT INTO catfeeder_cron.action_retries (action, due_at, retry_at)
        SELECT id::text, slot, retry_at FROM next
        WHERE verdict = 'retried' AND state = 'running' AND repeat_every IS NOT NULL
        ON CONFLICT (action) DO UPDATE SET due_at = excluded.due_at, retry_at = excluded.retry_at),
    forgotten AS (
        DELETE FROM catfeeder_cron.action_retries r USING next
        WHERE next.repeat_every IS NOT NULL AND next.verdict <> 'retried' AND r.action = next.id::text),
    stored AS (
        UPDATE {actions} AS a
        SET lease_owner = NULL, lease_until = NULL,
            state = CASE WHEN next.state <> 'running' THEN next.state
                         WHEN next.verdict = 'retried' OR repeat_at IS NOT NULL THEN 'pending'
                         ELSE next.verdict END,
            due_at = CASE WHEN next.state <> 'running' THEN a.due_at
                          WHEN next.verdict = 'retried' THEN {retry_at}
                          ELSE coalesce({repeat_at}, a.due_at) END,
            attempts = CASE WHEN next.state = 'running' AND repeat_at IS NOT NULL THEN 0 ELSE a.attempts END,
            last_error = CASE WHEN next.verdict = 'done' THEN NULL ELSE next.detail END
        FROM next WHERE a.id = next.id
        RETURNING a.id)
    SELECT verdict.id, next.verdict,
           (SELECT coalesce(a.lease_owner = verdict.owner, false) FROM {actions} a WHERE a.id = verdict.id)
    FROM verdict LEFT JOIN next ON next.id = verdict.id"""


@dataclass(frozen=True)
class StoredOutcome:
    """A finished attempt whose outcome needs no further call."""

    finished: Finished
    verdict: str | None
    """The outcome that was stored; None if the row did not have the lease any more."""
    is_deleted: bool
    """Whether there is no such row any more."""


def store(
    connection: Connection,
    tables: ActionTables,
    finished: Sequence[Finished],
    retry_after_seconds: float,
    logged: Collection[Any] = (),
) -> tuple[list[StoredOutcome], list[Finished]]:
    """Store outcomes; return those that are dealt with, and those that must wait because their row is locked.

    The actions in `logged` have their line in "ActionLog" already. The call may be repeated when its answer was lost:
    it then changes nothing.
    """
    by_id = {each.claimed.action.id: each for each in finished}
    parameters = {
        "ids": [each.claimed.action.id for each in finished],
        "owners": [each.claimed.owner for each in finished],
        "verdicts": [each.verdict for each in finished],
        "details": [each.detail for each in finished],
        "waits": [wait_seconds(each, retry_after_seconds) for each in finished],
        "starts": [(each.begun_as or each.claimed.owner)[-27:] for each in finished],
        "ages": [elapsed_seconds() - each.at for each in finished],
        "again": _MAY_BE_AGAIN,
        "known": [each.claimed.action.id in logged for each in finished],
    }
    rows = connection.execute(tables.statement(_STORE), parameters).fetchall()
    seen_to, locked = [], []
    for key, verdict, still_ours in rows:
        if verdict is None and still_ours:
            locked.append(by_id[key])
        else:
            seen_to.append(StoredOutcome(by_id[key], verdict, is_deleted=still_ours is None))
    return seen_to, locked


def wait_seconds(finished: Finished, retry_after_seconds: float) -> float:
    """Return the pause before the next attempt. It doubles from attempt to attempt, unless the handler asks for more.

    A random part of up to a quarter is added, so that actions that failed together are not retried together.
    """
    exponent = min(finished.claimed.action.attempt - 1, 30)
    wait: float = min(_LONGEST_WAIT_SECONDS, retry_after_seconds * 2**exponent)
    return max(wait, finished.after_seconds) * (1 + random.random() / 4)  # noqa: S311
