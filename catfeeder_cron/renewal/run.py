"""One run of the job: it asks all providers at once, stores each answer as it comes in, and never loses one."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from catfeeder_cron.coroutines import run_coroutine
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, JobTimedOut, RenewalError
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.batch_writer import WENT_BACK, BatchWriter
from catfeeder_cron.renewal.circuit_breaker import CircuitBreaker
from catfeeder_cron.renewal.claims import Claimer, is_current
from catfeeder_cron.renewal.failures import called_dead, confirm_dead, dismiss_dead
from catfeeder_cron.renewal.hosts import Host, has_looked, require_host, this_host, why_wait
from catfeeder_cron.renewal.journal import Journal, new_journal, require_writable
from catfeeder_cron.renewal.kept_answers import KeptAnswers, delete_old
from catfeeder_cron.renewal.links import Due, Links, Window, window
from catfeeder_cron.renewal.provider_worker import ProviderWorker
from catfeeder_cron.renewal.recovery import journal_folder, recover, tell_put_back
from catfeeder_cron.renewal.summary import (
    COUNTS,
    Known,
    count_so_far,
    count_what_would_be_done,
    hindrances,
    name_of,
    settle_up,
)

if TYPE_CHECKING:
    from catfeeder_cron.oauth.session import Session

log = get_logger("catfeeder_cron.oauth")

_LOOK_AGAIN_SECONDS = 2.0

# Another session that locked a row for a moment has released it by then.
_SECOND_LOOK_SECONDS = 0.5


def renew_due(context: JobContext, jitter: timedelta) -> None:
    """Renew every token that would end before the job's next run.

    Raises RenewalError when nothing could be renewed and the reason is on our side, and JobInterrupted when the run
    ended early. The requests under way are then awaited, and their answers stored.
    """
    client, links = context.resources.oauth, Links.find(context.database, context.tables)
    if not context.dry_run:
        context.counts.update(dict.fromkeys(COUNTS, 0))
        recover(context, look=not has_looked(context))
    due_window = window(context, client.settings.renew_before, jitter)
    due, known = _look_up(context, links, due_window)
    if context.dry_run:
        wait = why_wait(context, this_host(context.resources.state_directory))
        count_what_would_be_done(context, due, hindrances(due, known), wait.reason if wait else None)
        require_writable(context.resources.state_directory)
        return
    host = lineage = None
    if any(each.free for each in due):
        host = require_host(context.resources.state_directory)
        lineage, waited = _wait_for_other_hosts(context, host)
        if waited:  # answers were put back meanwhile
            due, known = _look_up(context, links, due_window)
    RenewalRun(context, client, links, due_window, due, known, host, lineage).go()


def _look_up(context: JobContext, links: Links, due_window: Window) -> tuple[list[Due], Known]:
    """Return what is due, and the providers of that."""
    with context.transaction() as connection:
        due = links.count(connection, due_window)
        names = [each.provider for each in due if each.provider]
        return due, providers.load(connection, links, context.resources.oauth.settings, names)


def _wait_for_other_hosts(context: JobContext, host: Host) -> tuple[Lineage | None, bool]:
    """Wait until every host has put back the answers that the database has lost, and go on doing so for this one.

    Returns the history that the run may work on, and whether it waited. Raises JobInterrupted and DatabaseError.
    """
    told = set[tuple[str, ...]]()
    while True:
        lineage = context.database.lineage  # first: what is found out next is at least as new
        wait = why_wait(context, host)
        if wait is None:
            return lineage, bool(told)
        if wait.hosts not in told:  # who they are is known only when a heartbeat has noticed
            told.add(wait.hosts)
            seconds, hosts = round(wait.most_seconds), ", ".join(wait.hosts)
            log.warning("oauth_waits_for_other_hosts", hosts=hosts, at_most_seconds=seconds, reason=wait.reason)
        context.stop.wait(_LOOK_AGAIN_SECONDS)
        context.checkpoint()
        recover(context)


class RenewalRun:
    """Runs one worker for each provider that has due rows, and reports the counts at the end."""

    def __init__(
        self,
        context: JobContext,
        client: OAuthClient,
        links: Links,
        window: Window,
        due: Sequence[Due],
        known: Known,
        host: Host | None,
        lineage: Lineage | None,
    ) -> None:
        self._context = context
        self._client = client
        self._links = links
        self._window = window
        self._due = due
        self._known = known
        self._host = host
        self._lineage = lineage
        self._hindered = hindrances(due, known)
        self._owner: UUID = uuid4()
        self._writer: BatchWriter | None = None
        self._workers: list[ProviderWorker] = []
        self._total = sum(each.free for each in due)
        self._settled = 0
        self._left: dict[str, int] | None = None
        """The rows of each provider that could still be claimed at the last count."""

    def go(self) -> None:
        """Renew, fill in the counts, and raise the error of the run, if it has one."""
        waiting = [each for each in self._due if each.provider and each.free and name_of(each) not in self._hindered]
        try:
            if waiting and self._host:
                folder = journal_folder(self._context)
                kept = KeptAnswers(folder)
                kept.refresh()
                with new_journal(folder, self._owner) as journal:
                    self._host.renews(self._context.database, self._lineage)
                    run_coroutine(self._renew(waiting, journal, kept))
        finally:
            self._let_answers_go()
            settle_up(self._context, self._due, self._hindered, self._workers, self._left or {})
        self._raise_what_went_wrong()

    def _let_answers_go(self) -> None:
        """Delete answers that are too old; put back those of this run that the database has lost meanwhile."""
        if self._writer is None or self._host is None:
            return
        tell_put_back(self._writer.put_back)
        keep = self._client.settings.keep_answers
        delete_old(self._context.resources.state_directory, keep.total_seconds())
        with suppress(DatabaseError):  # the next run does it
            self._host.renews(self._context.database, self._lineage)
            if self._writer.went_back():
                recover(self._context)

    async def _renew(self, waiting: list[Due], journal: Journal, kept: KeptAnswers) -> None:
        settings = self._client.settings
        writer = BatchWriter(
            self._context, settings, self._links, self._owner, journal, kept, self._progress, self._lineage
        )
        self._writer = writer
        self._progress(0)
        async with self._client.session(writer.longest_request) as session:
            storing = asyncio.create_task(writer.run())
            try:
                self._workers = [self._worker(each, writer, session) for each in waiting]
                ended = await self._make_passes(writer)
                for worker in self._workers:
                    await self._decide_on_dead(worker, writer)
            finally:
                await writer.end()
                await storing
        for each in ended:
            if isinstance(each, BaseException):
                journal.keep = True
                raise each

    async def _make_passes(self, writer: BatchWriter) -> list[BaseException | None]:
        """Let the workers go over their rows, and again over the rows left, as long as a pass brings new answers."""
        workers, ended = self._workers, list[BaseException | None]()
        while True:
            answers = self._answers()
            ended += await asyncio.gather(*(worker.renew() for worker in workers), return_exceptions=True)
            await writer.flush()
            self._left = await writer.in_thread(self._count_left)
            is_second_look, workers = (
                workers is not self._workers,
                [worker for worker in self._workers if self._has_left(worker)],
            )
            if not workers or writer.is_ending() or (is_second_look and self._answers() == answers):
                return ended
            await asyncio.sleep(_SECOND_LOOK_SECONDS)

    def _answers(self) -> int:
        return sum(worker.breaker.answers for worker in self._workers)

    def _count_left(self) -> dict[str, int] | None:
        """Count the rows that were not reached, are locked by another session, or were given back.

        Return None when the database can't answer.
        """
        try:
            with self._context.database.transaction() as connection:
                left = {name_of(each): each.free for each in self._links.count(connection, self._window)}
            if self._writer and not is_current(self._context, self._lineage):
                self._writer.end_run(WENT_BACK)
        except DatabaseError:
            return None
        return left

    def _has_left(self, worker: ProviderWorker) -> bool:
        """Return whether the worker could go on. Where the last count failed, assume that it could."""
        return worker.breaker.halted is None and (self._left is None or bool(self._left.get(worker.provider.name)))

    def _worker(self, due: Due, writer: BatchWriter, session: "Session") -> ProviderWorker:
        assert due.provider is not None
        provider, state = self._known[due.provider]
        lease, fingerprint = self._client.settings.lease, provider.fingerprint
        claimer = Claimer(self._links, self._window, self._owner, lease, provider.name, fingerprint, self._lineage)
        return ProviderWorker(writer, session, provider, CircuitBreaker(writer, provider, state), claimer)

    def _progress(self, settled: int) -> None:
        self._settled += settled
        self._context.progress(min(self._settled, self._total), self._total)
        count_so_far(self._context, self._workers)

    async def _decide_on_dead(self, worker: ProviderWorker, writer: BatchWriter) -> None:
        """Confirm or dismiss the tokens that the provider called dead, now that all its answers are known."""
        if not worker.breaker.dead:
            return
        database, undecided = self._context.database, worker.breaker.dead
        try:
            provider = worker.provider.name
            worker.breaker.suspect(*await writer.in_thread(called_dead, database, self._links, provider, self._window))
            if worker.breaker.is_suspect:
                worker.counts["failed"] += await writer.in_thread(dismiss_dead, database, worker.id)
                return
            while ids := await writer.in_thread(confirm_dead, database, worker.id):
                undecided -= len(ids)
                worker.counts["needs_reauth"] += len(ids)
                for id in ids:
                    log.warning("oauth_needs_new_login", provider=provider, oauth_id=id)
        except DatabaseError as error:
            # The next run asks again.
            worker.counts["postponed"] += undecided
            log.warning("oauth_failures_not_decided", provider=worker.provider.name, rows=undecided, reason=str(error))

    def _raise_what_went_wrong(self) -> None:
        writer = self._writer
        if writer and writer.unstored:
            raise DatabaseUnavailable(
                f"{writer.unstored} answers could not be stored; they are kept in the journal, to be stored as soon as "
                "the database can be reached and their rows are not locked"
            )
        if writer and writer.left_open:
            raise DatabaseUnavailable(
                f"the database was away at the end: {writer.left_open} rows are claimed still, until the next run"
            )
        if writer and writer.broken:
            raise RenewalError(writer.broken)
        if writer and writer.is_ending() and any(self._has_left(worker) for worker in self._workers):
            self._context.stop.raise_if_set()
            raise JobTimedOut(f"not done within its timeout of {self._context.timeout.total_seconds():g} s")
        counts = self._context.counts
        reasons = {name: hindrance.reason for name, hindrance in self._hindered.items() if hindrance.ours}
        refusing = [worker for worker in self._workers if worker.breaker.refused]
        reasons |= {worker.provider.name: worker.breaker.halted or "" for worker in refusing}
        if reasons and counts["due"] and not (counts["renewed"] or counts["needs_reauth"] or counts["failed"]):
            listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
            raise RenewalError(f"nothing could be renewed: {listed}")
