"""The results of claims: how a batch of them is stored, and counted once it is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from catfeeder_cron.database import Database
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.claims import TokenClaim, release
from catfeeder_cron.renewal.entries import Entry
from catfeeder_cron.renewal.failures import Failure, settle
from catfeeder_cron.renewal.journal import Journal
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.renewal.storing import StoredAnswers, store

log = get_logger("catfeeder_cron.oauth")


@dataclass(frozen=True)
class Settlement:
    """The result of one claim: an entry of the journal or a failure; neither when it was not sent."""

    claim: TokenClaim
    counts: Counter[str]
    """The worker's counts, to which the result is added once it is stored."""
    entry: Entry | None = None
    failure: Failure | None = None
    again: bool = False
    """The entry is a kept answer, and nothing was sent."""


@dataclass(frozen=True)
class SettlementStore:
    """Stores settlements of the run `owner` in the database, and counts them."""

    database: Database
    links: Links
    owner: UUID
    journal: Journal
    end_run: Callable[[str], None]
    """Called with the reason why the run must send nothing new; in the thread that `store` runs in."""

    def store(self, batch: list[Settlement]) -> StoredAnswers:
        """Store a batch, its answers last. Raises DatabaseError; the call may then be repeated."""
        # Runs in a thread. The event loop awaits it before it stores another batch, so no two are stored at the same
        # time; it may append to the journal meanwhile, and `sync` is safe beside that.
        entries = [each.entry for each in batch if each.entry and not each.again]
        if entries:
            try:
                self.journal.sync()
            except OSError as error:
                self.end_run(f"the journal can't be written to the disk: {error.strerror}")
        settle(self.database, self.links, self.owner, [each.failure for each in batch if each.failure])
        release(self.database, self.owner, [each.claim.id for each in batch if not (each.entry or each.failure)])
        # The answers come last because their count is the number of rows changed: a repeated call would change none.
        kept = [each.entry for each in batch if each.entry and each.again]
        outcome = store(self.database, self.links, kept, again=True)
        outcome.add(store(self.database, self.links, entries))
        return outcome

    def account(self, batch: list[Settlement], outcome: StoredAnswers) -> tuple[list[Settlement], int]:
        """Count the results of a batch, and mark its answers in the journal. Called in the event loop.

        Returns the answers whose rows are locked by other sessions, and how many kept answers were put back.
        """
        stored, locked = {entry.id for entry in outcome.stored}, {entry.id for entry in outcome.locked}
        refused = {entry.id: reason for entry, reason in outcome.refused}
        put_back = 0
        for each in batch:
            if each.entry and each.claim.id in refused:
                each.counts["failed"] += 1
                self.journal.keep = True
                log.error("oauth_answer_refused", oauth_id=each.claim.id, reason=refused[each.claim.id])
            elif each.entry and each.claim.id not in locked:
                self.journal.settle(each.entry)
                put_back += each.again and each.claim.id in stored
                if each.claim.id in stored and not each.again:
                    each.counts["renewed" if each.entry.token else "failed"] += 1
            elif each.failure and not each.failure.dead:
                each.counts["failed" if each.failure.failed else "postponed"] += 1
        return [each for each in batch if each.entry and each.claim.id in locked], put_back
