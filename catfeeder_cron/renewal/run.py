"""One run of the job: all providers at once, answers stored as they come in, and nothing lost when it ends early."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from catfeeder_cron.coroutines import run_coroutine
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, JobTimedOut, RenewalError
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.batch_writer import Outbox
from catfeeder_cron.renewal.circuit_breaker import Patience
from catfeeder_cron.renewal.claims import Claimer
from catfeeder_cron.renewal.failures import called_dead, confirm_dead, dismiss_dead
from catfeeder_cron.renewal.journal import Journal, new_journal, require_writable
from catfeeder_cron.renewal.links import Due, Links, Window, window
from catfeeder_cron.renewal.provider_worker import Lane
from catfeeder_cron.renewal.recovery import journal_folder, recover
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

log = get_logger(__name__)

# Somebody who had locked a row for a moment is done with it by then.
_SECOND_LOOK_SECONDS = 0.5


def renew_due(context: JobContext, jitter: timedelta) -> None:
    """Renew every token that would end before the job's next run.

    Raises RenewalError when nothing could be renewed for a reason of ours, and JobInterrupted when the run ended early;
    what is in flight then is awaited and stored.
    """
    client, links = context.oauth, Links(context.tables)
    links.require(context)
    if not context.dry_run:
        context.counts.update(dict.fromkeys(COUNTS, 0))
        recover(context)
    due_window = window(context, client.settings.renew_before, jitter)
    with context.transaction() as connection:
        due = links.count(connection, due_window)
        known = providers.load(connection, links, client.settings, [each.provider for each in due if each.provider])
    if context.dry_run:
        count_what_would_be_done(context, due, hindrances(due, known))
        require_writable(context.state_directory)
        return
    Run(context, client, links, due_window, due, known).go()


class Run:
    """One lane for each provider that has something due, and what is told of them in the end."""

    def __init__(
        self, context: JobContext, client: OAuthClient, links: Links, window: Window, due: Sequence[Due], known: Known
    ) -> None:
        self._context = context
        self._client = client
        self._links = links
        self._window = window
        self._due = due
        self._known = known
        self._hindered = hindrances(due, known)
        self._owner: UUID = uuid4()
        self._outbox: Outbox | None = None
        self._lanes: list[Lane] = []
        self._total = sum(each.free for each in due)
        self._settled = 0
        self._left: dict[str, int] | None = None
        """The rows of each provider that could be claimed still, as of the last look."""

    def go(self) -> None:
        waiting = [each for each in self._due if each.provider and each.free and name_of(each) not in self._hindered]
        try:
            if waiting:
                with new_journal(journal_folder(self._context), self._owner) as journal:
                    run_coroutine(self._renew(waiting, journal))
        finally:
            settle_up(self._context, self._due, self._hindered, self._lanes, self._left or {})
        self._raise_what_went_wrong()

    async def _renew(self, waiting: list[Due], journal: Journal) -> None:
        outbox = Outbox(self._context, self._client.settings, self._links, self._owner, journal, self._progress)
        self._outbox = outbox
        self._progress(0)
        async with self._client.session(outbox.longest_request) as session:
            storing = asyncio.create_task(outbox.run())
            try:
                self._lanes = [self._lane(each, outbox, session) for each in waiting]
                ended = await self._make_passes(outbox)
                for lane in self._lanes:
                    await self._judge(lane, outbox)
            finally:
                await outbox.end()
                await storing
        for each in ended:
            if isinstance(each, BaseException):
                journal.keep = True
                raise each

    async def _make_passes(self, outbox: Outbox) -> list[BaseException | None]:
        """Have the lanes go over their rows, and again over what could not be had, while that brings something."""
        lanes, ended = self._lanes, list[BaseException | None]()
        while True:
            answers = self._answers()
            ended += await asyncio.gather(*(lane.renew() for lane in lanes), return_exceptions=True)
            await outbox.flush()
            self._left = await outbox.in_thread(self._count_left)
            is_second_look, lanes = lanes is not self._lanes, [lane for lane in self._lanes if self._has_left(lane)]
            if not lanes or outbox.is_ending() or (is_second_look and self._answers() == answers):
                return ended
            await asyncio.sleep(_SECOND_LOOK_SECONDS)

    def _answers(self) -> int:
        return sum(lane.patience.answers for lane in self._lanes)

    def _count_left(self) -> dict[str, int] | None:
        """Count what was not reached, is locked by somebody, or was given back. None where that can't be known."""
        try:
            with self._context.database.transaction() as connection:
                return {name_of(each): each.free for each in self._links.count(connection, self._window)}
        except DatabaseError:
            return None

    def _has_left(self, lane: Lane) -> bool:
        """Whether the lane could go on, as far as is known."""
        return lane.patience.halted is None and (self._left is None or bool(self._left.get(lane.provider.name)))

    def _lane(self, due: Due, outbox: Outbox, session: "Session") -> Lane:
        assert due.provider is not None
        provider, standing = self._known[due.provider]
        lease, fingerprint = self._client.settings.lease, provider.fingerprint
        claimer = Claimer(self._links, self._window, self._owner, lease, provider.name, fingerprint)
        return Lane(outbox, session, provider, Patience(outbox, provider, standing), claimer)

    def _progress(self, settled: int) -> None:
        self._settled += settled
        self._context.progress(min(self._settled, self._total), self._total)
        count_so_far(self._context, self._lanes)

    async def _judge(self, lane: Lane, outbox: Outbox) -> None:
        """Make up the mind about tokens that the provider has called dead, now that all its answers are known."""
        if not lane.patience.dead:
            return
        database, undecided = self._context.database, lane.patience.dead
        try:
            provider = lane.provider.name
            lane.patience.judge(*await outbox.in_thread(called_dead, database, self._links, provider, self._window))
            if lane.patience.suspect:
                lane.counts["failed"] += await outbox.in_thread(dismiss_dead, database, lane.id)
                return
            while ids := await outbox.in_thread(confirm_dead, database, lane.id):
                undecided -= len(ids)
                lane.counts["needs_reauth"] += len(ids)
                for id in ids:
                    log.warning("oauth_needs_new_login", provider=provider, oauth_id=id)
        except DatabaseError as error:
            # The next run asks again.
            lane.counts["postponed"] += undecided
            log.warning("oauth_verdicts_left_open", provider=lane.provider.name, rows=undecided, reason=str(error))

    def _raise_what_went_wrong(self) -> None:
        outbox = self._outbox
        if outbox and outbox.unstored:
            raise DatabaseUnavailable(
                f"{outbox.unstored} answers could not be stored; they are kept in the journal, to be stored as soon as "
                "the database can be reached and their rows are not locked"
            )
        if outbox and outbox.left_open:
            raise DatabaseUnavailable(
                f"the database was away at the end: {outbox.left_open} rows are claimed still, until the next run"
            )
        if outbox and outbox.broken:
            raise RenewalError(outbox.broken)
        if outbox and outbox.is_ending() and any(self._has_left(lane) for lane in self._lanes):
            self._context.stop.raise_if_set()
            raise JobTimedOut(f"not done within its timeout of {self._context.timeout.total_seconds():g} s")
        counts = self._context.counts
        reasons = {name: hindrance.reason for name, hindrance in self._hindered.items() if hindrance.ours}
        refusing = [lane for lane in self._lanes if lane.patience.refused]
        reasons |= {lane.provider.name: lane.patience.halted or "" for lane in refusing}
        if reasons and counts["due"] and not (counts["renewed"] or counts["needs_reauth"] or counts["failed"]):
            told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
            raise RenewalError(f"nothing could be renewed: {told}")
