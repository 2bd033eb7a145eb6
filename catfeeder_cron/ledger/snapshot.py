"""Reads the state of the jobs from the ledger, for callers that ask often and can't wait."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable, StatementTimeout
from catfeeder_cron.ledger.history import Account, accounts

_FRESH_SECONDS = 2
_ANSWER_WITHIN_SECONDS = 2
_QUERY_TIMEOUT = timedelta(seconds=2)


@dataclass(frozen=True)
class Snapshot:
    """The accounts of the jobs, or in `trouble` why the ledger could not be read."""

    reachable: bool
    trouble: str | None = None
    accounts: dict[str, Account] = field(default_factory=dict)


_NO_ANSWER = Snapshot(reachable=False, trouble=f"the database has not answered for {_ANSWER_WITHIN_SECONDS} s")


class SnapshotReader:
    """Reads the ledger on demand, in one thread and at most every two seconds, however many threads wait for it.

    A database that hangs holds up that one thread only. All methods may be called from any thread.
    """

    def __init__(self, database: Database, jobs: Callable[[], list[str]]) -> None:
        self._database = database
        self._jobs = jobs
        # Held by the threads that ask, for the moment in which one of them starts the thread that reads. The reading
        # thread does not take it: it sets the snapshot before `_answered`, and the others read it after that.
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._answered.set()
        self._snapshot = _NO_ANSWER
        self._read_at = float("-inf")

    def now(self) -> Snapshot:
        """Return a snapshot that is at most two seconds old, within two seconds."""
        with self._lock:
            if self._answered.is_set() and time.monotonic() - self._read_at > _FRESH_SECONDS:
                self._answered.clear()
                threading.Thread(target=self._read, name="snapshot", daemon=True).start()
            answered = self._answered
        return self._snapshot if answered.wait(_ANSWER_WITHIN_SECONDS) else _NO_ANSWER

    def _read(self) -> None:
        try:
            self._snapshot = Snapshot(True, None, accounts(self._database, self._jobs(), _QUERY_TIMEOUT))
        except (DatabaseUnavailable, StatementTimeout) as error:
            self._snapshot = Snapshot(False, str(error))
        except CatfeederCronError as error:
            self._snapshot = Snapshot(True, str(error))
        finally:
            self._read_at = time.monotonic()
            self._answered.set()
