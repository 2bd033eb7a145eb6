"""One run of the job: all providers at once, answers stored as they come in, and nothing lost when it ends early."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, JobTimedOut, RenewalError
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.claims import Claimer
from catfeeder_cron.renewal.journal import Journal, new_journal, require_writable
from catfeeder_cron.renewal.lane import Lane
from catfeeder_cron.renewal.links import Due, Links, Window, window
from catfeeder_cron.renewal.outbox import Outbox
from catfeeder_cron.renewal.patience import Patience
from catfeeder_cron.renewal.providers import Standing
from catfeeder_cron.renewal.storing import confirm_dead, dismiss_dead
from catfeeder_cron.renewal.takeover import journal_folder, recover

if TYPE_CHECKING:
    from catfeeder_cron.oauth.session import Session

log = get_logger(__name__)

COUNTS = ("due", "renewed", "needs_reauth", "failed", "postponed")


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
        _count_only(context, due, known)
        require_writable(context.state_directory)
        return
    Run(context, client, links, due_window, due, known).go()


def _count_only(context: JobContext, due: list[Due], known: dict[str, tuple[Provider, Standing]]) -> None:
    context.counts["would_renew"] = 0
    for each in due:
        name, hindrance = _name(each), _hindrance(each, known)
        context.counts["would_renew"] += 0 if hindrance else each.free
        context.by_provider[name] = Counter(
            would_renew=0 if hindrance else each.free, postponed=each.rows if hindrance else each.rows - each.free
        )
        if reason := hindrance.reason if hindrance else each.why_not_free():
            context.provider_reasons[name] = reason


def _name(due: Due) -> str:
    return due.provider or due.service or "(no service)"


@dataclass(frozen=True)
class Hindrance:
    """Why nothing can be renewed at a provider, and whether that is for us to change."""

    reason: str
    ours: bool


def _hindrance(due: Due, known: dict[str, tuple[Provider, Standing]]) -> Hindrance | None:
    """Return what keeps a provider from being asked from the start."""
    if due.provider is None or due.provider not in known:  # its row may have gone since the rows were counted
        return Hindrance("its service has no row in the table of providers", ours=True)
    provider, standing = known[due.provider]
    if provider.fault:
        return Hindrance(provider.fault, ours=True)
    if standing.paused_seconds > 0:
        return Hindrance(f"paused for {standing.paused_seconds:.0f} s more: {standing.reason}", ours=standing.refused)
    return None


class Run:
    """One lane for each provider that has something due, and what is told of them in the end."""

    def __init__(
        self,
        context: JobContext,
        client: OAuthClient,
        links: Links,
        window: Window,
        due: list[Due],
        known: dict[str, tuple[Provider, Standing]],
    ) -> None:
        self._context = context
        self._client = client
        self._links = links
        self._window = window
        self._due = due
        self._known = known
        self._owner: UUID = uuid4()
        self._outbox: Outbox | None = None
        self._lanes: list[Lane] = []
        self._total = sum(each.free for each in due)
        self._settled = 0
        self._cut_short = False

    def go(self) -> None:
        hindrances = {_name(each): hindrance for each in self._due if (hindrance := _hindrance(each, self._known))}
        waiting = [each for each in self._due if each.provider and each.free and _name(each) not in hindrances]
        try:
            if waiting:
                with new_journal(journal_folder(self._context), self._owner) as journal:
                    asyncio.run(self._renew(waiting, journal))
        finally:
            self._tell(hindrances)
        self._raise_what_went_wrong(hindrances)

    async def _renew(self, waiting: list[Due], journal: Journal) -> None:
        outbox = Outbox(self._context, self._client.settings, self._links, self._owner, journal, self._progress)
        self._outbox = outbox
        self._progress(0)
        async with self._client.session() as session:
            storing = asyncio.create_task(outbox.run())
            self._lanes = [self._lane(each, outbox, session) for each in waiting]
            ended = await asyncio.gather(*(lane.renew() for lane in self._lanes), return_exceptions=True)
            await outbox.end()
            await storing
        for lane in self._lanes:
            await outbox.in_thread(self._judge, lane)
        for each in ended:
            if isinstance(each, BaseException):
                journal.keep = True
                raise each

    def _lane(self, due: Due, outbox: Outbox, session: "Session") -> Lane:
        assert due.provider is not None
        provider, standing = self._known[due.provider]
        lease, fingerprint = self._client.settings.lease, provider.fingerprint
        claimer = Claimer(self._links, self._window, self._owner, lease, provider.name, fingerprint)
        return Lane(outbox, session, provider, Patience(outbox, provider, standing), claimer)

    def _progress(self, settled: int) -> None:
        self._settled += settled
        self._context.progress(min(self._settled, self._total), self._total)
        self._count()

    def _judge(self, lane: Lane) -> None:
        """Make up the mind about tokens that the provider has called dead, now that all its answers are known."""
        if not lane.patience.dead:
            return
        try:
            if lane.patience.suspect:
                dismiss_dead(self._context.database, lane.id)
                lane.counts["failed"] += lane.patience.dead
                return
            while ids := confirm_dead(self._context.database, lane.id):
                lane.counts["needs_reauth"] += len(ids)
                for id in ids:
                    log.warning("oauth_needs_new_login", provider=lane.provider.name, oauth_id=id)
        except DatabaseUnavailable:
            pass  # told by the database itself; the next run asks again

    def _count(self) -> None:
        for name in ("renewed", "needs_reauth", "failed"):
            self._context.counts[name] = sum(lane.counts[name] for lane in self._lanes)

    def _tell(self, hindrances: dict[str, Hindrance]) -> None:
        """Count what was left, in all and by provider."""
        left = self._left()
        self._count()
        lanes = {lane.provider.name: lane for lane in self._lanes}
        for each in self._due:
            name = _name(each)
            lane, hindrance = lanes.get(name), hindrances.get(name)
            counts = Counter({key: lane.counts[key] if lane else 0 for key in COUNTS})
            backing_off = each.rows - each.leased - each.free
            counts["postponed"] = backing_off + (left.get(name, 0) if lane else each.free)
            counts["due"] = sum(counts[key] for key in COUNTS if key != "due")
            if counts["due"]:
                self._context.by_provider[name] = counts
                reason = hindrance.reason if hindrance else (lane and lane.patience.halted) or each.why_not_free()
                if reason:
                    self._context.provider_reasons[name] = reason
                log.info("oauth_provider_finished", provider=name, **counts, **({"reason": reason} if reason else {}))
        for key in ("due", "postponed"):
            self._context.counts[key] = sum(counts[key] for counts in self._context.by_provider.values())

    def _left(self) -> dict[str, int]:
        """Count the rows that could be claimed still: not reached, locked by somebody, or given back."""
        if self._outbox is None:
            return {}
        self._cut_short = self._outbox.is_ending()
        try:
            with self._context.database.transaction() as connection:
                due = self._links.count(connection, self._window)
        except DatabaseError:
            return {}
        left = {_name(each): each.free for each in due}
        self._cut_short = self._cut_short and any(left.values())
        return left

    def _raise_what_went_wrong(self, hindrances: dict[str, Hindrance]) -> None:
        outbox = self._outbox
        if outbox and outbox.unstored:
            raise DatabaseUnavailable(
                f"{outbox.unstored} answers could not be stored; they are kept in the journal, to be stored as soon as "
                "the database can be reached"
            )
        if outbox and outbox.broken:
            raise RenewalError(outbox.broken)
        if self._cut_short:
            self._context.stop.raise_if_set()
            raise JobTimedOut(f"not done within its timeout of {self._context.timeout.total_seconds():g} s")
        counts = self._context.counts
        reasons = {name: hindrance.reason for name, hindrance in hindrances.items() if hindrance.ours}
        refusing = [lane for lane in self._lanes if lane.patience.refused]
        reasons |= {lane.provider.name: lane.patience.halted or "" for lane in refusing}
        if reasons and counts["due"] and not (counts["renewed"] or counts["needs_reauth"] or counts["failed"]):
            told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
            raise RenewalError(f"nothing could be renewed: {told}")
