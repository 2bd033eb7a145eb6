"""What the workers of a run hand in to be stored, as it comes in; and whether anything new may still be sent."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar
from uuid import UUID

from catfeeder_cron.config import OAuthSettings
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, LockTimeout, StatementTimeout
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.claims import TokenClaim, release
from catfeeder_cron.renewal.failures import Failure, settle
from catfeeder_cron.renewal.journal import Entry, Journal
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.renewal.storing import StoredAnswers, store

log = get_logger("catfeeder_cron.oauth")

_BATCH = 500
_STATEMENTS_AT_ONCE = 4
_TRY_AGAIN_SECONDS = 0.5

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Settlement:
    """What came of one claim: an entry of the journal or a failure; neither when it was not sent."""

    claim: TokenClaim
    counts: Counter[str]
    """The worker's: where it is counted, once it is stored."""
    entry: Entry | None = None
    failure: Failure | None = None


class BatchWriter:
    """Made and used inside one event loop. `stored` is called after every batch with how many were settled."""

    def __init__(
        self,
        context: JobContext,
        settings: OAuthSettings,
        links: Links,
        owner: UUID,
        journal: Journal,
        stored: Callable[[int], None],
    ) -> None:
        self.settings = settings
        self.context = context
        self.slots = asyncio.Semaphore(settings.concurrency)
        """For the requests under way."""
        self.unstored = 0
        """Answers that are in the journal alone, because storing them was given up."""
        self.left_open = 0
        """Rows that are still under this run's lease, for the same reason."""
        self.broken: str | None = None
        """Why this run can't go on."""
        self.longest_request = min(settings.request_timeout, context.timeout / 2)
        """No request is given longer, so that its answer comes within the job's time."""
        self._links = links
        self._owner = owner
        self._journal = journal
        self._stored = stored
        # Not asyncio's own threads, which look up names: a name server that is silent must not hold up statements.
        self._threads = ThreadPoolExecutor(_STATEMENTS_AT_ONCE, thread_name_prefix="renew-oauth")
        self._queue: asyncio.Queue[Settlement | None] = asyncio.Queue(maxsize=2 * settings.concurrency)

    def is_ending(self) -> bool:
        """Whether nothing new may be sent: its answer could come after the job's time, too."""
        return self.context.stopping or self.broken is not None or self.context.overdue() > -self.longest_request

    async def in_thread(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Call what waits for the database."""
        call = partial(copy_context().run, function, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def wait_for_database(self) -> None:
        await asyncio.sleep(_TRY_AGAIN_SECONDS)

    def write_down(self, entry: Entry) -> None:
        """Journal an answer. Where that fails, it is still stored, but nothing new is sent."""
        try:
            self._journal.append(entry)
        except OSError as error:
            self._break(f"answers can't be written to the journal: {error.strerror}")

    async def put(self, settlement: Settlement) -> None:
        """Have it stored. Waits while there is much to store, as when the database is away."""
        await self._queue.put(settlement)

    async def flush(self) -> None:
        """Return when all that was put before was tried to be stored."""
        await self._queue.join()

    async def end(self) -> None:
        """Let `run` return when all that was put before is dealt with."""
        await self._queue.put(None)

    async def run(self) -> None:
        """Store in batches of whatever has come in while the batch before was stored, until `end`.

        An answer whose row is locked by somebody else is tried again and again, and holds up no other.
        """
        locked: list[Settlement] = []
        ended, failure = False, None
        while not ended or locked:
            batch = [] if ended else await self._take(_TRY_AGAIN_SECONDS if locked else None)
            ended = ended or None in batch
            try:
                blocked = await self._store([each for each in batch if each is not None])
                if locked and (ended or not batch):
                    locked = await self._store(locked)
                locked += blocked
            except Exception as error:  # noqa: BLE001 (raised below: until then somebody must empty the queue)
                failure, locked = error, []
                self._journal.keep = True
                self._break(f"{type(error).__name__} while answers were stored")
            for _ in batch:
                self._queue.task_done()
        self._threads.shutdown(wait=False)
        if failure:
            raise failure

    async def _take(self, breaker: float | None) -> list[Settlement | None]:
        """Wait for something to store, at most so many seconds; return all there is."""
        try:
            async with asyncio.timeout(breaker):
                batch = [await self._queue.get()]
        except TimeoutError:
            return []
        while len(batch) < _BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch

    async def _store(self, batch: list[Settlement]) -> list[Settlement]:
        """Store a batch, as soon as the database can be reached; return what somebody else has locked."""
        while batch:
            try:
                locked = self._account(batch, await self.in_thread(self._store_batch, batch))
                return self._leave_to_journal(locked) if self._gives_up() else locked
            except (DatabaseUnavailable, LockTimeout, StatementTimeout) as error:
                log.debug("oauth_answers_not_stored_yet", answers=len(batch), reason=str(error))
            except DatabaseError as error:
                self._break(str(error))
            if self._gives_up():
                batch = self._leave_to_journal(batch)
            if batch:
                await asyncio.sleep(_TRY_AGAIN_SECONDS)
        return []

    def _leave_to_journal(self, batch: list[Settlement]) -> list[Settlement]:
        """Give up on what is in the journal; return the answers that are not, and would be lost.

        The journal stays in any case: by it the next run frees the leases.
        """
        self._journal.keep = self._journal.keep or bool(batch)
        nowhere_else = []
        for each in batch:
            if each.entry and not self._journal.holds(each.entry):
                nowhere_else.append(each)
                continue
            self.unstored += each.entry is not None
            self.left_open += each.entry is None
            each.counts["postponed"] += 1
        return nowhere_else

    def _gives_up(self) -> bool:
        """Whether what could not be stored at once is left to the journal."""
        return self.context.stopping or self.broken is not None

    def _store_batch(self, batch: list[Settlement]) -> StoredAnswers:
        entries = [each.entry for each in batch if each.entry]
        if entries:
            try:
                self._journal.sync()
            except OSError as error:
                self._break(f"the journal can't be written to the disk: {error.strerror}")
        database = self.context.database
        settle(database, self._links, self._owner, [each.failure for each in batch if each.failure])
        release(database, self._owner, [each.claim.id for each in batch if not (each.entry or each.failure)])
        # The last, because it alone is counted by what it changes: repeated, it would find nothing to change.
        return store(database, self._links, entries, time.time())

    def _account(self, batch: list[Settlement], outcome: StoredAnswers) -> list[Settlement]:
        """Count what is done; return what is left because others have it locked."""
        stored, locked = {entry.id for entry in outcome.stored}, {entry.id for entry in outcome.locked}
        refused = {entry.id: reason for entry, reason in outcome.refused}
        for each in batch:
            if each.entry and each.claim.id in refused:
                each.counts["failed"] += 1
                self._journal.keep = True
                log.error("oauth_answer_refused", oauth_id=each.claim.id, reason=refused[each.claim.id])
            elif each.entry and each.claim.id not in locked:
                self._journal.remove(each.entry)
                if each.claim.id in stored:
                    each.counts["renewed" if each.entry.token else "failed"] += 1
            elif each.failure and not each.failure.dead:
                each.counts["failed" if each.failure.failed else "postponed"] += 1
        left = [each for each in batch if each.entry and each.claim.id in locked]
        self._stored(len(batch) - len(left))
        return left

    def _break(self, reason: str) -> None:
        if self.broken is None:
            self.broken = reason
            log.error("oauth_run_aborted", reason=reason)
