"""One run of the job: it claims due actions until none is left, has them performed, and stores their outcomes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from catfeeder_cron.actions.action import Handler
from catfeeder_cron.actions.due.attempts import Attempts
from catfeeder_cron.actions.due.fair_order import Busy, Candidate, FairOrder, due_in_fair_order
from catfeeder_cron.actions.due.handlers import Handlers
from catfeeder_cron.actions.due.leases import LOST, Claimed, Leases
from catfeeder_cron.actions.due.memory import KEPT_SECONDS, memory_of
from catfeeder_cron.actions.due.put_back import again_as, put_back
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.actions.due.unstored import UnstoredOutcomes
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.database import single
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable, JobInterrupted, JobTimedOut
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.actions")

# How often a run checks whether it was asked to stop, and how soon it sees rows that became due meanwhile.
_LOOK_SECONDS = 1.0
# Reading the due rows, which takes long when there are many, may use one part in this many of the run's time.
_READING_SHARE = 10
# The others take a lease over when it has run out and its owner had 30 s to come back (see leases).
_MOST_EXTEND_EVERY_SECONDS = 20.0
_DONE_BEFORE = "the database had lost their outcomes, and this process has stored them again"


@dataclass(frozen=True)
class Limits:
    """The limits of one run. `retry_after` is the pause before the second attempt."""

    concurrency: int
    lease: timedelta
    action_timeout: timedelta
    retry_after: timedelta


class DueActionsRun:
    """Runs the actions that are due: at its end each is done, waits for a retry, or belongs to another daemon.

    All methods run in the run's thread.
    """

    def __init__(
        self,
        context: JobContext,
        tables: ActionTables,
        settings: ActionsSettings,
        built_in: Mapping[str, Handler],
        limits: Limits,
    ) -> None:
        self._context = context
        self._tables = tables
        self._limits = limits
        self._leases = Leases(tables, limits.lease, lambda: context.database.lineage)
        self._memory = memory_of(context.database)
        self._done_before = 0
        self._must_wait = False  # leases have run out whose owners may come back
        lease_seconds = limits.lease.total_seconds()
        action_timeout_seconds = limits.action_timeout.total_seconds()
        children = context.resources.children
        self._attempts = Attempts(Handlers(settings, built_in, children, action_timeout_seconds, lease_seconds))
        self._extend_every = min(lease_seconds / 3, _MOST_EXTEND_EVERY_SECONDS)
        self._lineage = self._known_lineage
        self._extended_at = self._reached_at = elapsed_seconds()
        self._last_call = min(limits.action_timeout, context.timeout / 4)
        self._under_way: dict[Any, Claimed] = {}
        self._unstored = UnstoredOutcomes(context, tables, limits.retry_after)
        self._busy = Busy(limits.concurrency)
        self._order = FairOrder([])
        self._read_again_at = 0.0
        self._claimed_of_order = 0
        self._hits = 1.0
        self._cut_short = False

    def work(self) -> None:
        """Run until nothing is due. Raises the error that ended the run, after its attempts under way have ended.

        When the run is asked to stop, it claims nothing new and asks the handlers to end; when its time is over, it
        also cancels them. When the database can't be reached, they go on, as long as their leases last.
        """
        with self._context.transaction() as connection:
            (self._begun,) = single(connection, "SELECT now()::text")
        try:
            self._work()
        finally:
            self._unstored.remember(self._attempts.wait(0))
            if self._done_before:
                log.warning("action_was_done_before", actions=self._done_before, reason=_DONE_BEFORE)

    def _work(self) -> None:
        # The thread that requests the stop asks the handlers to end: this thread may wait for the database.
        with self._attempts, self._context.stop.calling(self._ask_to_stop):
            try:
                while self._take_on():
                    self._look_after()
            except CatfeederCronError as error:
                if isinstance(error, JobInterrupted):
                    self._attempts.ask_to_stop(error.grace_seconds)
                if isinstance(error, JobTimedOut):
                    self._cut_short = True
                    self._attempts.cancel(list(self._under_way))
                while not self._idle:
                    self._look_after()
                raise

    @property
    def _known_lineage(self) -> UUID | None:
        lineage = self._context.database.lineage
        return None if lineage is None else lineage.id

    def _ask_to_stop(self) -> None:
        self._attempts.ask_to_stop(self._context.stop.grace_left_seconds)

    @property
    def _idle(self) -> bool:
        return not self._under_way and not self._unstored

    def _take_on(self) -> bool:
        """Claim rows for the free slots; return False when the run is over."""
        self._context.checkpoint()
        free = self._limits.concurrency - len(self._under_way) - len(self._unstored)
        if self._context.overdue() > -self._last_call:
            return not self._idle  # an attempt that began now might not end in time
        if free <= 0:
            return True
        awaits = False
        if elapsed_seconds() >= self._read_again_at or (self._idle and not self._order):
            self._read_due()
            awaits = self._idle and not self._order.early
            if awaits:
                if not self._must_wait:
                    return False
                self._context.stop.wait(_LOOK_SECONDS)
        candidates = self._order.take(round(free / self._hits), self._busy)
        if candidates:
            self._claim(candidates, free)
        # If nothing of an order could be claimed, its rows are under other daemons' leases by now, or locked.
        return awaits or not self._idle or bool(self._order) or self._claimed_of_order > 0

    def _read_due(self) -> None:
        self._done_before += put_back(self._context, self._tables, self._leases)
        asked = elapsed_seconds()
        with self._context.transaction() as connection:
            held = [*self._under_way.values(), *self._unstored.claimed]
            # First: what has had its time by then is taken over by the next statement.
            self._must_wait = self._leases.lapsed_too_short_ago(connection, held)
            given_up = self._leases.take_over(connection, held)
            lineage = self._context.database.lineage
            self._order = due_in_fair_order(connection, self._tables, self._begun, lineage)
        self._claimed_of_order = 0
        for action in given_up:
            self._context.counts.update(due=1, given_up=1)
            log.warning("action_given_up", action=action, reason=LOST)
        now = elapsed_seconds()
        self._read_again_at = now + max(_LOOK_SECONDS, (now - asked) * _READING_SHARE)
        settled = self._unstored.settled
        self._context.progress(settled, settled + len(self._under_way) + self._order.early)

    def _claim(self, candidates: list[Candidate], free: int) -> None:
        with self._context.transaction() as connection:
            claimed = self._leases.claim(connection, [each.id for each in candidates], free)
        self._reached_at = elapsed_seconds()
        self._hits = max(0.1, 0.8 * self._hits + 0.2 * min(1.0, len(claimed) / min(free, len(candidates))))
        self._claimed_of_order += len(claimed)
        self._context.counts["due"] += len(claimed)
        fresh = []
        for each in claimed:
            before = self._memory.done_before(each)
            if before is None:
                self._under_way[each.action.id] = each
                self._busy.add(_candidate(each))
                fresh.append(each)
            else:
                self._done_before += 1
                self._unstored.add(again_as(each, before))
        self._attempts.begin(fresh)

    def _look_after(self) -> None:
        """Wait for attempts to finish, store their outcomes, and extend the leases of the others."""
        if self._under_way:
            for finished in self._attempts.wait(min(_LOOK_SECONDS, self._extend_every)):
                del self._under_way[finished.claimed.action.id]
                self._busy.remove(_candidate(finished.claimed))
                if finished.verdict == "cancelled" and self._cut_short:
                    finished = replace(finished, verdict="retried", detail="the run's time was over")
                self._unstored.add(finished)
        try:
            if self._unstored:
                self._reached_at = self._unstored.store(self._known_lineage)
                if self._unstored and not self._under_way:
                    time.sleep(min(_LOOK_SECONDS, self._extend_every) / 10)
            if self._under_way and self._must_extend():
                self._extend()
        except DatabaseUnavailable as error:
            if elapsed_seconds() - self._reached_at > self._limits.lease.total_seconds():
                if self._unstored:
                    actions = [str(each.action.id) for each in self._unstored.claimed]
                    log.error("action_outcomes_not_stored", actions=actions, kept_seconds=KEPT_SECONDS)
                raise
            log.debug("action_outcomes_not_stored_yet", outcomes=len(self._unstored), reason=str(error))
            time.sleep(min(_LOOK_SECONDS, self._extend_every))

    def _must_extend(self) -> bool:
        """Tell whether it is time, or the database's history went back: the rows may not be ours there."""
        return self._lineage != self._known_lineage or elapsed_seconds() - self._extended_at >= self._extend_every

    def _extend(self) -> None:
        lineage = self._known_lineage
        lease_ends = elapsed_seconds() + self._limits.lease.total_seconds()
        with self._context.database.transaction() as connection:
            ours, extended = self._leases.extend(connection, list(self._under_way.values()))
        self._extended_at = self._reached_at = elapsed_seconds()
        self._lineage = lineage
        self._attempts.extend(list(extended), lease_ends)
        self._attempts.cancel([each for each in self._under_way if each not in ours])


def recover(context: JobContext, tables: ActionTables, lease: timedelta) -> None:
    """Store the outcomes that this process remembers and the database does not have, if there are any."""
    leases = Leases(tables, lease, lambda: context.database.lineage)
    if stored := put_back(context, tables, leases):
        log.warning("action_was_done_before", actions=stored, reason=_DONE_BEFORE)


def _candidate(claimed: Claimed) -> Candidate:
    return Candidate(claimed.action.id, claimed.action.kind, claimed.action.user_id)
