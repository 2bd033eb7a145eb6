"""The report of a run, and the findings of a check."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from catfeeder_cron.times import timestamp

Outcome = Literal["succeeded", "failed", "skipped", "aborted", "timed_out"]
Level = Literal["ok", "warning", "error"]
Progress = Callable[[int, int], None]
"""Called with the amount of work that is done and with the whole amount."""


def no_progress(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class JobReport:
    """The result of one run. `reason` says in one line why it did not succeed."""

    job: str
    outcome: Outcome
    reason: str | None
    counts: dict[str, int]
    started_at: datetime
    duration: timedelta
    dry_run: bool
    by_provider: dict[str, dict[str, int]] = field(default_factory=dict)
    provider_reasons: dict[str, str] = field(default_factory=dict)
    run_id: int | None = None
    """Its number in the ledger, if it has one."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the JSON output; `providers` only where the job works with OAuth providers."""
        return {
            "job": self.job,
            "outcome": self.outcome,
            "reason": self.reason,
            "counts": self.counts,
            "started_at": timestamp(self.started_at),
            "duration_seconds": round(self.duration.total_seconds(), 3),
            "dry_run": self.dry_run,
            **({"providers": self._providers()} if self.by_provider else {}),
        }

    def _providers(self) -> dict[str, dict[str, Any]]:
        return {
            name: {**counts, **({"reason": self.provider_reasons[name]} if name in self.provider_reasons else {})}
            for name, counts in self.by_provider.items()
        }


@dataclass(frozen=True)
class Finding:
    """The result of a check about its subject, in one line."""

    level: Level
    subject: str
    message: str

    def as_json(self) -> dict[str, str]:
        """Return the fields for the JSON output."""
        return {"level": self.level, "subject": self.subject, "message": self.message}
