"""Complete runs that ended early, and put back the answers that the database has lost.

The answers in the journals of dead processes are stored, then their leases freed. Answers that were stored before go
again into rows that hold a refresh token which was sent: a failover or a restored backup has put those rows back.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TypeVar

from catfeeder_cron.database import Database, single
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.claims import free_leases
from catfeeder_cron.renewal.hosts import this_host, why_wait
from catfeeder_cron.renewal.journal import journals, left_journals
from catfeeder_cron.renewal.kept_answers import KeptAnswers, delete_old
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.renewal.storing import keep_in_doubt, store

T = TypeVar("T")

log = get_logger("catfeeder_cron.oauth")

_BATCH = 100
_HASHES_AT_ONCE = 1000

_PLACE = "SELECT id, now() FROM catfeeder_cron.oauth_identity LIMIT 1"

_HELD = """
    SELECT a.id, n.sent FROM unnest(%(ids)s::bigint[], %(sent)s::bytea[]) AS n(id, sent) JOIN {active} a ON a.id = n.id
    WHERE {hash} = n.sent"""

_FORGET = """
    DELETE FROM catfeeder_cron.oauth_tokens t WHERE (t.lease_until IS NULL OR t.lease_until <= now())
    AND NOT EXISTS (SELECT FROM {active} a WHERE a.id = t.oauth_id)"""


@dataclass
class PutBack:
    """How many answers were put back; `left` could not be, because their rows are locked."""

    answers: int = 0
    tried: int = 0
    left: int = 0


def journal_folder(context: JobContext) -> Path:
    """Return the directory of the journals for this database's table, so that no answer goes into another database."""
    return _place(context)[0]


def _place(context: JobContext) -> tuple[Path, datetime]:
    with context.database.transaction() as connection:
        identity, now = single(connection, _PLACE)
    table = f"{identity} {context.tables.schema_}.{context.tables.active_oauths}"
    return context.resources.state_directory / "oauth" / sha256(table.encode()).hexdigest()[:16], now


def take_over(database: Database, links: Links, folder: Path, keep_seconds: float) -> set[Path]:
    """Store the answers in the journals of `folder` that no living process holds, and free their runs' leases.

    The answers come first: with a free lease, another process could claim a row and send the token that the answer
    replaces. Raises DatabaseUnavailable; the journals then stay as they are. Returns those that stay because their
    rows refuse the answers.
    """
    refusing = set()
    for journal in left_journals(folder):
        kept = locked = False
        for start in range(0, len(journal.entries), _BATCH):
            outcome = store(database, links, journal.entries[start : start + _BATCH])
            for entry, reason in outcome.refused:
                log.error("oauth_answer_refused", oauth_id=entry.id, journal=str(journal.path), reason=reason)
            keep_in_doubt(database, outcome.locked)
            journal.settle([*outcome.stored, *outcome.outdated])
            locked = locked or bool(outcome.locked)
            kept = kept or locked or bool(outcome.refused)
            log.info("oauth_answers_recovered", stored=len(outcome.stored), outdated=len(outcome.outdated))
        if kept:
            journal.forget_settled(keep_seconds)
            if not locked:
                refusing.add(journal.path)
            continue  # the next run tries again
        freed = free_leases(database, journal.owner)
        if freed:
            log.info("oauth_leases_freed", rows=freed)
        if journal.unreadable:
            log.warning("oauth_journal_damaged", lines=journal.unreadable)
        journal.finish()
    return refusing


def put_back(database: Database, links: Links, kept: KeptAnswers, begins: Callable[[], None]) -> PutBack:
    """Store kept answers in the rows that hold a refresh token which was sent. Raises DatabaseUnavailable.

    It calls `begins` before the first of them is stored.

    A row with a newer login stays as it is. Any number of processes may do this at once.
    """
    done = PutBack()
    for spent in _in_batches(kept.spent(), _HASHES_AT_ONCE):
        parameters = {"ids": [each.id for each in spent], "sent": [each.sent for each in spent]}
        with database.transaction() as connection:
            held = dict(connection.execute(links.statement(_HELD), parameters).fetchall())
        # A refresh token that was sent twice stands here twice, and its row gets one answer.
        rows = {each.id: kept.find(each.sent, each.provider) for each in spent if held.get(each.id) == each.sent}
        for entries in _in_batches((entry.of_row(id) for id, entry in rows.items() if entry), _BATCH):
            if not done.tried:
                begins()
            done.tried += len(entries)
            outcome = store(database, links, entries, again=True)
            for entry, reason in outcome.refused:
                log.error("oauth_answer_refused", oauth_id=entry.id, reason=reason)
            done.answers += len(outcome.stored)
            done.left += len(outcome.locked)
    return done


def tell_put_back(answers: int) -> None:
    """Log that answers were put back."""
    if answers:
        log.warning(
            "oauth_answers_restored",
            answers=answers,
            reason="the database held refresh tokens that were sent already: it has lost its last seconds, or a backup "
            "was restored",
        )


def forget_deleted(context: JobContext) -> None:
    """Delete the state of links that are gone. Raises DatabaseError.

    It reads all links, so it belongs to the recovery and not to every run.
    """
    links = Links.find(context.database, context.tables)
    with context.database.transaction() as connection:
        connection.execute(links.statement(_FORGET))


def recover(context: JobContext, *, look: bool = True) -> None:
    """Take over the journals of dead processes; with `look`, put back what the database has lost. Raises DatabaseError.

    Old answers are deleted, and the other hosts are told that this one has looked.
    """
    state, links = context.resources.state_directory, Links.find(context.database, context.tables)
    keep_seconds = context.resources.oauth.settings.keep_answers.total_seconds()
    delete_old(state, keep_seconds)
    folder, looked_at = _place(context)
    lineage = context.database.lineage
    try:
        refusing = take_over(context.database, links, folder, keep_seconds)
        if not look:
            return
        # A run that is under way may still get answers. A run that waits for other hosts has no journal yet.
        is_complete = journals(folder) <= refusing
        kept = KeptAnswers(folder)
        kept.refresh()
        host = this_host(state)
        done = put_back(context.database, links, kept, partial(host.puts_back, context.database) if host else _nothing)
        tell_put_back(done.answers)
        if host and lineage and is_complete and not done.left:
            host.looked(context.database, lineage, looked_at)
    except OSError as error:
        log.error("oauth_journals_unreadable", folder=error.filename, reason=error.strerror)


def _nothing() -> None:
    """Do nothing: a folder without an id is on no list."""


def tend(context: JobContext) -> None:
    """Delete old answers, and look again as long as other hosts wait for it. Raises DatabaseError."""
    state = context.resources.state_directory
    delete_old(state, context.resources.oauth.settings.keep_answers.total_seconds())
    host, lineage = this_host(state), context.database.lineage
    if host and lineage and lineage.reason and why_wait(context, host):
        recover(context)


def _in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch
