"""Print the results of commands for people, as tables and sentences; `--json` prints the same results for scripts."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from catfeeder_cron.console.terminal import print_table
from catfeeder_cron.report import JobReport

if TYPE_CHECKING:
    from catfeeder_cron.ledger.history import Durations, PastRun
    from catfeeder_cron.renewal.forecast import LoginNeeded


def print_jobs(jobs: Sequence[dict[str, Any]]) -> None:
    """Print the result of overview.jobs. The column for notes appears only if there are any, to save room."""
    columns = ("JOB", "ENABLED", "TRIGGER", "NEXT RUN (UTC)", "LAST RUN (UTC)", "OUTCOME", "NOTES")
    rows = [
        (
            job["job"],
            "yes" if job["enabled"] else "no",
            job["trigger"],
            _second(job["next_run"]),
            _second(job["last_run"]),
            job["last_outcome"] or "-",
            _notes(job),
        )
        for job in jobs
    ]
    shown = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    print_table(columns[:shown], [row[:shown] for row in rows])


def print_status(found: dict[str, Any]) -> None:
    """Print the result of overview.status."""
    print_table(
        ("DAEMON", "HOST", "PID", "VERSION", "SINCE (UTC)", "LAST HEARTBEAT (UTC)", "RUNNING"),
        [
            (
                each["daemon"][:8] if each["kind"] == "daemon" else each["kind"],
                each["host"],
                str(each["pid"]),
                each["version"],
                _second(each["started_at"]),
                _second(each["heartbeat_at"]) + ("" if each["alive"] else " (dead)"),
                ", ".join(f"{run['job']} for {run['seconds']:g} s" for run in each["running"]) or "-",
            )
            for each in found["daemons"]
        ],
    )
    if not any(each["alive"] and each["kind"] == "daemon" for each in found["daemons"]):
        print("no daemon is alive")
    print()
    print_table(
        ("JOB", "NEXT RUN (UTC)", "LAST RUN (UTC)", "OUTCOME", "NOTES"),
        [
            (
                job["job"],
                _second(job["next_run"]),
                _second(job["last_run"]),
                job["last_outcome"] or "-",
                _notes(job),
            )
            for job in found["jobs"]
            if job["enabled"] or job["paused"]
        ],
    )


def print_history(runs: Sequence["PastRun"], durations: Iterable["Durations"]) -> None:
    """Print past runs, and how long they took."""
    print_table(
        ("RUN", "JOB", "SLOT (UTC)", "TRIGGER", "OUTCOME", "STARTED (UTC)", "SECONDS", "DETAILS"),
        [_in_cells(run) for run in runs],
    )
    for each in durations:
        print(
            f"{each.job}: {each.runs} succeeded, median {each.median.total_seconds():.2f} s, "
            f"longest {each.longest.total_seconds():.2f} s"
        )


def in_words(report: JobReport) -> str:
    """Return a line with the run's outcome and counts, and one more line for each provider."""
    parts = [
        report.outcome.replace("_", " "),
        *([report.reason] if report.reason else []),
        *_counts(report.counts),
    ]
    line = f"{report.job}: {', '.join(parts)} ({report.duration.total_seconds():.2f} s)"
    return "\n".join([line, *(_of_provider(name, report) for name in report.by_provider)])


def _of_provider(name: str, report: JobReport) -> str:
    reason = report.provider_reasons.get(name)
    return f"  {name}: {', '.join(_counts(report.by_provider[name]))}" + (f" ({reason})" if reason else "")


def print_forecast(links: Sequence["LoginNeeded"]) -> None:
    """Print the links that need a new login."""
    print_table(
        ("OAUTH", "USER", "PROVIDER", "NEEDED (UTC)", "REASON"),
        [
            (
                str(link.oauth_id),
                "-" if link.user_id is None else str(link.user_id),
                link.provider or "-",
                "now" if link.needed_now else _clock(link.needed_at),
                link.reason,
            )
            for link in links
        ],
    )


def _in_cells(run: "PastRun") -> tuple[str, ...]:
    details = [*([run.reason] if run.reason else []), *_counts(run.counts)]
    if run.runs > 1:
        details.append(f"{run.runs} runs between slots")
    if run.missed and run.last_slot:
        details.append(f"{run.missed} slots until {_clock(run.last_slot)}")
    return (
        str(run.run_id),
        run.job,
        _clock(run.slot) if run.slot else "-",
        run.trigger,
        run.outcome or "running",
        _clock(run.started_at),
        f"{run.duration.total_seconds():.2f}" if run.duration else "-",
        ", ".join(details),
    )


def _notes(job: dict[str, Any]) -> str:
    notes = []
    if job["paused"]:
        until = f" until {_second(job['paused_until'])}" if job["paused_until"] else ""
        because = f": {job['paused_because']}" if job["paused_because"] else ""
        notes.append(f"paused since {_second(job['paused_at'])}{until} by {job['paused_by']}{because}")
    if job.get("overdue_since"):
        notes.append(f"overdue since {_second(job['overdue_since'])}")
    return ", ".join(notes)


def _counts(counts: dict[str, int]) -> list[str]:
    return [f"{name.replace('_', ' ')} {number}" for name, number in counts.items()]


def _second(timestamp: str | None) -> str:
    """Return an ISO timestamp as date and time, to the second."""
    return (timestamp or "-")[:19].replace("T", " ")


def _clock(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
