"""Complete runs that ended early: store the answers in their journals, then free their leases."""

import time
from hashlib import sha256
from pathlib import Path

from catfeeder_cron.database import Database, single
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.claims import free_leases
from catfeeder_cron.renewal.journal import left_journals
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.renewal.storing import keep_in_doubt, store

log = get_logger("catfeeder_cron.oauth")

_BATCH = 100

_FORGET = """
    DELETE FROM catfeeder_cron.oauth_tokens t WHERE (t.lease_until IS NULL OR t.lease_until <= now())
    AND NOT EXISTS (SELECT FROM {active} a WHERE a.id = t.oauth_id)"""


def journal_folder(context: JobContext) -> Path:
    """Return the directory of the journals for this database's table, so that no answer goes into another database."""
    with context.database.transaction() as connection:
        (identity,) = single(connection, "SELECT id FROM catfeeder_cron.oauth_identity LIMIT 1")
    table = f"{identity} {context.tables.schema_}.{context.tables.active_oauths}"
    return context.resources.state_directory / "oauth" / sha256(table.encode()).hexdigest()[:16]


def take_over(database: Database, links: Links, folder: Path) -> None:
    """Store the answers in the journals of `folder` that no living process holds, and free their runs' leases.

    The answers come first: with a free lease, another process could claim a row and send the token that the answer
    replaces. Raises DatabaseUnavailable; the journals then stay as they are.
    """
    for journal in left_journals(folder):
        kept = False
        for start in range(0, len(journal.entries), _BATCH):
            outcome = store(database, links, journal.entries[start : start + _BATCH], time.time())
            for entry, reason in outcome.refused:
                log.error("oauth_answer_refused", oauth_id=entry.id, journal=str(journal.path), reason=reason)
            keep_in_doubt(database, outcome.locked)
            kept = kept or bool(outcome.refused or outcome.locked)
            log.info("oauth_answers_recovered", stored=len(outcome.stored), outdated=len(outcome.outdated))
        if kept:
            continue  # the next run tries again
        freed = free_leases(database, journal.owner)
        if freed:
            log.info("oauth_leases_freed", rows=freed)
        if journal.unreadable:
            log.warning("oauth_journal_damaged", lines=journal.unreadable)
        journal.remove()


def forget_deleted(context: JobContext) -> None:
    """Delete the state of links that are gone. Raises DatabaseError.

    It reads all links, so it belongs to the recovery and not to every run.
    """
    links = Links.find(context.database, context.tables)
    with context.database.transaction() as connection:
        connection.execute(links.statement(_FORGET))


def recover(context: JobContext) -> None:
    """Take over the journals of dead processes now. Raises DatabaseError."""
    try:
        take_over(context.database, Links.find(context.database, context.tables), journal_folder(context))
    except OSError as error:
        log.error("oauth_journals_unreadable", folder=error.filename, reason=error.strerror)
