"""The records that the ledger takes and returns."""

import os
import platform
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from catfeeder_cron.schedule import Slots
from catfeeder_cron.version import __version__

Trigger = Literal["schedule", "manual", "catch_up", "retry"]


@dataclass(frozen=True)
class Process:
    """Who we are to the others: a new identity for every process, since host names and pids come again."""

    kind: Literal["daemon", "run-once"]
    daemon: UUID = field(default_factory=uuid4)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    def parameters(self) -> dict[str, Any]:
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
    """The pause before the first; before each further one it is twice as long, an hour at most."""
    before: datetime | None
    """The next slot, which takes the place of a retry."""


@dataclass(frozen=True)
class Closed:
    """What came of recording how a run ended."""

    by_another: bool
    """It was closed before, by somebody who had taken this process for dead."""
    retry_in: timedelta | None
    """When it is to be made again, if it is."""


@dataclass(frozen=True)
class Heartbeat:
    """What a process learns when it tells that it lives."""

    open_runs: set[int]
    """Its own: one that was thought to be and is not was closed by somebody else."""
    closed: list[str]
    """In words, the runs of dead processes that were closed."""
    retries: dict[str, timedelta]
    """The jobs that are to be retried before the next heartbeat, and in how long."""


@dataclass(frozen=True)
class SlotClaim:
    """What came of claiming a slot: where the job's account stands, and the run if it is the caller's."""

    accounted_until: datetime
    run_id: int | None
    too_early: bool
