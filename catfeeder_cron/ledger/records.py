"""The records that the ledger takes and returns."""

import os
import platform
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.report import JobReport
from catfeeder_cron.schedule import Slots
from catfeeder_cron.version import __version__

Trigger = Literal["schedule", "manual", "catch_up", "retry"]


@dataclass(frozen=True)
class Process:
    """The identity of this process in the ledger. It is new for every process: host names and pids are used again."""

    kind: Literal["daemon", "run-once"]
    daemon: UUID = field(default_factory=uuid4)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the statements that name this process."""
        return {"daemon": self.daemon, "kind": self.kind, "host": self.host, "pid": self.pid, "version": __version__}


@dataclass(frozen=True)
class Missed:
    """A stretch of slots that did not run, and why."""

    slots: Slots
    reason: str


@dataclass(frozen=True)
class Retries:
    """How often a run that failed is made again, and how soon."""

    most: int
    after: timedelta
    """The pause before the first retry; before each further one it is twice as long, an hour at most."""
    before: datetime | None
    """The next slot, which takes the place of a retry."""


@dataclass(frozen=True)
class OpenRun:
    """A run of this process that is under way."""

    run_id: int
    job: str
    slot: datetime | None
    trigger: Trigger
    shared: bool
    age: timedelta


@dataclass(frozen=True)
class RunRecord:
    """A run that has ended, as this process knows it: enough to record it anew where the ledger has lost it."""

    run_id: int
    report: JobReport
    slot: datetime | None = None
    trigger: Trigger = "schedule"
    shared: bool = False


@dataclass(frozen=True)
class Closed:
    """The answer to the record of how a run ended."""

    vanished: bool
    """The ledger has no such run of this process: the server has lost its last seconds."""
    by_another: bool
    """Another process had closed the run before, because it took this one for dead."""
    retry_in: timedelta | None
    """How soon the run is retried; None if it is not."""


@dataclass(frozen=True)
class Heartbeat:
    """The answer to a heartbeat."""

    open_runs: set[int]
    """The open runs of this process. One that is missing here was closed by another process."""
    closed: list[str]
    """Descriptions of the runs of dead processes that this heartbeat has closed."""
    retries: dict[str, timedelta]
    """The jobs that are to be retried before the next heartbeat, and how soon."""
    working: dict[int, str] = field(default_factory=dict, compare=False)
    """The backends, by pid, that still work on a statement of a dead process's run, with descriptions of the runs."""
    server_now: datetime | None = field(default=None, compare=False)
    """What the server's clock showed."""
    lineage: Lineage | None = field(default=None, compare=False)
    """Which history of the database it met."""
    went_back: bool = field(default=False, compare=False)
    """Whether that is another one than at the heartbeat before: the database went back, or may have."""
    reopened: dict[str, int] = field(default_factory=dict, compare=False)
    """The jobs whose runs here got another record, because the server had lost theirs, with its number."""


@dataclass(frozen=True)
class SlotClaim:
    """The answer to the claim of a slot: until when the job's slots are accounted for, and the run of the caller."""

    accounted_until: datetime
    run_id: int | None
    """None if the caller does not get the run."""
    too_early: bool
    """The slot lies ahead by the database's clock."""
    wait_seconds: float | None = None
    """In how many seconds the slot may be claimed, where the database has just gone back."""
