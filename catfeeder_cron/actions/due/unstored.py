"""The outcomes of a run's attempts, from their end until the database has them, and what is told of them then."""

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from catfeeder_cron.actions.due import outcomes
from catfeeder_cron.actions.due.attempts import Finished
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.actions.due.memory import memory_of
from catfeeder_cron.actions.due.outcomes import StoredOutcome
from catfeeder_cron.actions.due.put_back import already_logged
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable
from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.actions")

_COUNTED = {"done": "done", "retried": "retried", "failed": "given_up"}


class UnstoredOutcomes:
    """Keeps finished attempts until their outcomes are stored; then it counts, logs and remembers these.

    All methods run in the run's thread.
    """

    def __init__(self, context: JobContext, tables: ActionTables, retry_after: timedelta) -> None:
        self.settled = 0
        """How many attempts need no further call."""
        self._context = context
        self._tables = tables
        self._retry_after_seconds = retry_after.total_seconds()
        self._memory = memory_of(context.database)
        self._finished: list[Finished] = []

    def __len__(self) -> int:
        return len(self._finished)

    @property
    def claimed(self) -> list[Claimed]:
        """The actions whose outcomes are not stored yet."""
        return [each.claimed for each in self._finished]

    def add(self, finished: Finished) -> None:
        """Keep an attempt that has finished."""
        self._finished.append(finished)

    def store(self, lineage: UUID | None) -> float:
        """Store the outcomes, even after the run's time; those of locked rows wait for the next call.

        `lineage` is the history of the database as far as it is known. Returns when the database had answered, by
        times.elapsed_seconds. Raises DatabaseUnavailable; all outcomes then wait for the next call.
        """
        try:
            stored, self._finished = self._store_together(self._finished)
        except DatabaseUnavailable:
            raise
        except DatabaseError:
            stored = []
            finished, self._finished = self._finished, []
            for one in finished:
                stored += self._store_alone(one)
        answered_at = elapsed_seconds()
        for each in stored:
            self._settle(each, lineage)
        return answered_at

    def remember(self, others: list[Finished]) -> None:
        """Remember the outcomes that are not stored, and those of these other attempts."""
        for finished in (*self._finished, *others):
            self._remember(finished, None, finished.claimed.lineage)

    def _store_together(self, finished: list[Finished]) -> tuple[list[StoredOutcome], list[Finished]]:
        with self._context.database.transaction() as connection:
            known = already_logged(connection, self._tables, [each for each in finished if each.begun_as])
            return outcomes.store(connection, self._tables, finished, self._retry_after_seconds, known)

    def _store_alone(self, finished: Finished) -> list[StoredOutcome]:
        """Store one outcome. If the database refuses it, the row's lease runs out, and in the end its attempts do."""
        try:
            stored, locked = self._store_together([finished])
        except DatabaseUnavailable:
            self._finished.append(finished)
            return []
        except DatabaseError as error:
            log.error("action_outcome_refused", action=finished.claimed.action.id, reason=str(error))
            return []
        self._finished += locked
        return stored

    def _settle(self, stored: StoredOutcome, lineage: UUID | None) -> None:
        claimed, action = stored.finished.claimed, stored.finished.claimed.action
        if not (stored.is_deleted and claimed.lineage == lineage):  # else the web server has deleted it
            self._remember(stored.finished, stored.verdict, lineage)
        self.settled += 1
        if stored.verdict in _COUNTED:
            self._context.counts[_COUNTED[stored.verdict]] += 1
        if stored.verdict != "done":
            event = {"retried": "action_retried", "failed": "action_given_up", "cancelled": "action_cancelled"}
            write = log.warning if stored.verdict == "failed" else log.info
            write(
                event.get(stored.verdict or "", "action_was_deleted" if stored.is_deleted else "action_was_taken_over"),
                action=action.id,
                kind=action.kind,
                attempt=action.attempt,
                reason=stored.finished.detail,
            )

    def _remember(self, finished: Finished, stored_as: str | None, lineage: UUID | None) -> None:
        """Remember an outcome with the history that it was stored in, or else with that of its claim."""
        verdict = finished.verdict if stored_as is None else stored_as
        if verdict not in ("done", "retried", "failed"):
            return
        if verdict == "retried":
            seconds = outcomes.wait_seconds(finished, self._retry_after_seconds)
            finished = replace(finished, after_seconds=seconds)
        elif verdict != finished.verdict:
            finished = replace(finished, verdict="failed")
        stored = stored_as is not None
        self._memory.add(finished, lineage if stored else finished.claimed.lineage, stored=stored)
