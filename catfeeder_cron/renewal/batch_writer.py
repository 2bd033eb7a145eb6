"""Store the results of a run's workers in batches as they come in, and decide whether a new request may be sent."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar
from uuid import UUID

from catfeeder_cron.config import OAuthSettings
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, LockTimeout, StatementTimeout
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.entries import Entry
from catfeeder_cron.renewal.journal import Journal
from catfeeder_cron.renewal.kept_answers import KeptAnswers
from catfeeder_cron.renewal.links import Links
from catfeeder_cron.renewal.settlements import Settlement, SettlementStore

log = get_logger("catfeeder_cron.oauth")

WENT_BACK = (
    "the database has lost its last seconds, or a backup was restored, while tokens were renewed: the next run first "
    "puts back what it has lost"
)

_BATCH = 500
_STATEMENTS_AT_ONCE = 4
_TRY_AGAIN_SECONDS = 0.5

P = ParamSpec("P")
T = TypeVar("T")


class BatchWriter:
    """Stores settlements from one event loop, in which it is made and used; `in_thread` keeps statements out of it.

    It calls `stored` in the event loop after every batch, with the number of settlements that are done.
    """

    def __init__(
        self,
        context: JobContext,
        settings: OAuthSettings,
        links: Links,
        owner: UUID,
        journal: Journal,
        kept: KeptAnswers,
        stored: Callable[[int], None],
        lineage: Lineage | None = None,
    ) -> None:
        self.settings = settings
        self.kept = kept
        """The answers that this host has kept; used in the event loop only."""
        self.put_back = 0
        """Kept answers that were stored again."""
        self.context = context
        self.slots = asyncio.Semaphore(settings.concurrency)
        """Limits the requests under way at the same time."""
        self.unstored = 0
        """Answers that are in the journal only, because this run gave up storing them."""
        self.left_open = 0
        """Rows that are still under this run's lease, because it gave up storing their result."""
        self.broken: str | None = None
        """The reason why this run can't go on."""
        self.longest_request = min(settings.request_timeout, context.timeout / 2)
        """The timeout of a request, short enough that its answer comes within the job's time."""
        self._settlements = SettlementStore(context.database, links, owner, journal, self.end_run)
        self._journal = journal
        self._lineage = lineage
        self._under_way = 0
        self._stored = stored
        # Not asyncio's default threads: they look up host names, and a silent name server must not delay statements.
        # Only functions given to `in_thread` run in them; all fields are used by the event loop's thread, except for
        # those that `end_run` and SettlementStore.store use.
        self._threads = ThreadPoolExecutor(_STATEMENTS_AT_ONCE, thread_name_prefix="renew-oauth")
        self._queue: asyncio.Queue[Settlement | None] = asyncio.Queue(maxsize=2 * settings.concurrency)

    def is_ending(self) -> bool:
        """Return whether no new request may be sent, for example because its answer could come after the job's time."""
        if self.went_back():
            self.end_run(WENT_BACK)
        return self.context.stopping or self.broken is not None or self.context.overdue() > -self.longest_request

    def went_back(self) -> bool:
        """Return whether a heartbeat has noticed that the database's history went back during this run."""
        latest = self.context.database.lineage
        return bool(self._lineage and latest and latest.id != self._lineage.id)

    async def in_thread(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Call a function that waits for the database in a thread of this writer's, with the caller's log context."""
        call = partial(copy_context().run, function, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def wait_for_database(self) -> None:
        """Wait for a moment before the next attempt to reach the database."""
        await asyncio.sleep(_TRY_AGAIN_SECONDS)

    @contextmanager
    def room_for_answer(self) -> Iterator[bool]:
        """Reserve space in the journal for the answer to a request; yield False, and end the run, if there is none."""
        self._under_way += 1
        try:
            try:
                self._journal.reserve(self._under_way)
                has_room = True
            except OSError as error:
                self.end_run(f"no token is sent, because there is no room for the answers: {error.strerror}")
                has_room = False
            yield has_room
        finally:
            self._under_way -= 1

    def write_down(self, entry: Entry) -> None:
        """Append an answer to the journal. If that fails, the answer is still stored, but the run sends nothing new."""
        try:
            self._journal.append(entry)
        except OSError as error:
            self.end_run(f"answers can't be written to the journal: {error.strerror}")

    async def put(self, settlement: Settlement) -> None:
        """Queue a settlement for storing. Waits while the queue is full, for example while the database is away."""
        await self._queue.put(settlement)

    async def flush(self) -> None:
        """Return when the writer has tried to store all settlements that were put before."""
        await self._queue.join()

    async def end(self) -> None:
        """Make `run` return after all settlements that were put before."""
        await self._queue.put(None)

    async def run(self) -> None:
        """Store settlements until `end`, each time in a batch of those that came in during the batch before.

        An answer whose row is locked by another session is tried again and again, and delays no other answer.
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
            except Exception as error:  # noqa: BLE001 (raised below; until then this loop must empty the queue)
                failure, locked = error, []
                self._journal.keep = True
                self.end_run(f"{type(error).__name__} while answers were stored")
            for _ in batch:
                self._queue.task_done()
        self._threads.shutdown(wait=False)
        if failure:
            raise failure

    async def _take(self, wait_seconds: float | None) -> list[Settlement | None]:
        """Wait for a settlement, at most `wait_seconds`; return all that are queued, up to a batch."""
        try:
            async with asyncio.timeout(wait_seconds):
                batch = [await self._queue.get()]
        except TimeoutError:
            return []
        while len(batch) < _BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch

    async def _store(self, batch: list[Settlement]) -> list[Settlement]:
        """Store a batch as soon as the database can be reached; return the answers whose rows are locked."""
        while batch:
            try:
                outcome = await self.in_thread(self._settlements.store, batch)
                locked, put_back = self._settlements.account(batch, outcome)
                self.put_back += put_back
                self._stored(len(batch) - len(locked))
                return self._leave_to_journal(locked) if self._gives_up() else locked
            except (DatabaseUnavailable, LockTimeout, StatementTimeout) as error:
                log.debug("oauth_answers_not_stored_yet", answers=len(batch), reason=str(error))
            except DatabaseError as error:
                self.end_run(str(error))
            if self._gives_up():
                batch = self._leave_to_journal(batch)
            if batch:
                await asyncio.sleep(_TRY_AGAIN_SECONDS)
        return []

    def _leave_to_journal(self, batch: list[Settlement]) -> list[Settlement]:
        """Give up the answers that are in the journal; return those that are not in it and would be lost.

        The journal stays in any case, because the next run needs it to free the leases.
        """
        self._journal.keep = self._journal.keep or bool(batch)
        nowhere_else = []
        for each in batch:
            if each.entry and not (each.again or self._journal.holds(each.entry)):
                nowhere_else.append(each)
                continue
            self.unstored += each.entry is not None
            self.left_open += each.entry is None
            each.counts["postponed"] += 1
        return nowhere_else

    def _gives_up(self) -> bool:
        """Return whether answers that could not be stored at once stay in the journal."""
        if self.went_back():
            self.end_run(WENT_BACK)
        return self.context.stopping or self.broken is not None

    def end_run(self, reason: str) -> None:
        """Send nothing new in this run, and say why."""
        if self.broken is None:
            self.broken = reason
            log.error("oauth_run_aborted", reason=reason)
