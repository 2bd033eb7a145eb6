"""Stores outcomes again that the database has lost, or has not got, before the actions are handed out again."""

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from catfeeder_cron.actions.due import outcomes
from catfeeder_cron.actions.due.attempts import Finished
from catfeeder_cron.actions.due.leases import Claimed, Leases
from catfeeder_cron.actions.due.memory import Remembered, memory_of
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.database import Connection, single
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.actions")

_AT_ONCE = 500
_MOST_TOLD = 20

# A row that another session has locked comes without its columns. The slot is that of the row's key (see leases.py).
_LOOK_UP = """
    WITH locked AS MATERIALIZED (
        SELECT a.id, a.state, coalesce(a.attempts, 0) AS attempts, a.lease_owner, a.repeat_every IS NOT NULL AS repeats,
               coalesce((SELECT r.due_at FROM catfeeder_cron.action_retries r
                         WHERE r.action = a.id::text AND {retry_shown} = a.due_at), {due_of_a}) AS slot
        FROM {actions} a WHERE a.id = ANY(%(ids)s) FOR UPDATE SKIP LOCKED)
    SELECT a.id, l.state, l.attempts, l.lease_owner, l.repeats, l.repeats AND l.slot = v.due_at,
           l.repeats AND l.slot < v.due_at
    FROM {actions} a LEFT JOIN locked l USING (id)
    JOIN unnest(%(ids)s, %(dues)s::timestamptz[]) AS v (id, due_at) ON v.id = a.id
    WHERE a.id = ANY(%(ids)s)"""

_MAY_READ_LOG = "SELECT has_table_privilege(%(table)s, 'SELECT')"
_LOGGED = """
    SELECT action_id FROM {action_log}
    WHERE action_id = ANY(%(ids)s) AND (action_id, attempt, started_at) IN (
        SELECT id, attempt, {started}
        FROM unnest(%(ids)s, %(attempts)s::int[], %(starts)s::text[]) AS v (id, attempt, start))"""

DETAIL = "the database had lost this outcome, and the process that ran it has stored it again"
_ELSEWHERE = "this process had ended them, but the database did not know that, and has handed them out again"
_VANISHED = "this process had ended them, and the database does not have their rows any more"


@dataclass
class _Found:
    """What became of the rows of remembered attempts, by the keys of those."""

    to_claim: dict[Any, Remembered] = field(default_factory=dict)
    ours: dict[Any, Remembered] = field(default_factory=dict)
    intact: list[Remembered] = field(default_factory=list)
    elsewhere: list[Remembered] = field(default_factory=list)
    vanished: list[Remembered] = field(default_factory=list)


def put_back(context: JobContext, tables: ActionTables, leases: Leases) -> int:
    """Store what this process remembers and the database does not have; return how many outcomes that were.

    An action that another process has begun again meanwhile, or whose row has vanished, is told in the log. Any number
    of processes and threads may do this at the same time. Raises DatabaseError.
    """
    memory, lineage = memory_of(context.database), context.database.lineage
    stored, elsewhere, vanished = 0, list[Any](), list[Any]()
    waiting = iter(memory.to_look_up(lineage))
    while some := list(islice(waiting, _AT_ONCE)):
        by_id = {each.finished.claimed.action.id: each for each in some}
        with context.transaction() as connection:
            found = _look_up(connection, tables, by_id)
            claimed = leases.claim(connection, list(found.to_claim), len(found.to_claim), done_before=True)
            again = [again_as(each, found.to_claim[each.action.id]) for each in claimed]
            again += [again_as(each.finished.claimed, each) for each in found.ours.values()]
            if again:
                logged = already_logged(connection, tables, again)
                outcomes.store(connection, tables, again, 0, logged)
        for finished in again:
            memory.mark_stored(finished.claimed.action.key, lineage)
        for each in found.intact:
            memory.mark_stored(each.finished.claimed.action.key, lineage)
        for each in (*found.elsewhere, *found.vanished):
            memory.looked_up(each, lineage)
        stored += len(again)
        elsewhere += [each.finished.claimed.action.id for each in found.elsewhere]
        vanished += [each.finished.claimed.action.id for each in found.vanished]
    if elsewhere:
        log.warning("actions_begun_again", actions=elsewhere[:_MOST_TOLD], count=len(elsewhere), reason=_ELSEWHERE)
    if vanished:
        log.error("action_rows_vanished", actions=vanished[:_MOST_TOLD], count=len(vanished), reason=_VANISHED)
    return stored


def again_as(claimed: Claimed, remembered: Remembered) -> Finished:
    """Return a remembered outcome as that of a claim."""
    before = remembered.finished
    detail = DETAIL if before.detail is None else f"{before.detail}; {DETAIL}"
    return replace(before, claimed=claimed, detail=detail, begun_as=before.begun_as or before.claimed.owner)


def already_logged(connection: Connection, tables: ActionTables, finished: list[Finished]) -> set[Any]:
    """Return the actions whose line in "ActionLog" is there, as far as this role may read that."""
    if not finished:
        return set()
    table = tables.statement("{action_log}").as_string(connection)
    (may_read,) = single(connection, _MAY_READ_LOG, {"table": table})
    if not may_read:
        return set()
    parameters = {
        "ids": [each.claimed.action.id for each in finished],
        "attempts": [each.claimed.action.attempt for each in finished],
        "starts": [(each.begun_as or each.claimed.owner)[-27:] for each in finished],
    }
    return {id for (id,) in connection.execute(tables.statement(_LOGGED), parameters)}


def _look_up(connection: Connection, tables: ActionTables, by_id: dict[Any, Remembered]) -> _Found:
    found = _Found()
    dues = [each.finished.claimed.action.due_at for each in by_id.values()]
    rows = connection.execute(tables.statement(_LOOK_UP), {"ids": list(by_id), "dues": dues}).fetchall()
    for id, state, attempts, owner, repeats, same_slot, earlier_slot in rows:
        remembered = by_id.pop(id)
        before = remembered.finished
        if state is None or earlier_slot:
            continue  # locked, or gone back by more than one repetition: it is looked at again when it is handed out
        if repeats and not same_slot:
            found.intact.append(remembered)
        elif state == "running" and owner == before.claimed.owner:
            found.ours[id] = remembered
        elif state == "running":
            found.elsewhere.append(remembered)
        elif state == "pending" and (before.verdict != "retried" or attempts < before.claimed.action.attempt):
            found.to_claim[id] = remembered
        else:
            found.intact.append(remembered)
    found.vanished.extend(by_id.values())
    return found
