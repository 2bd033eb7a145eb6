"""Metrics for Prometheus: counters change when a run ends, gauges are read when Prometheus asks.

prometheus_client costs 85 ms and some megabytes, so this module is imported only if [metrics] listen is set.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from catfeeder_cron.database import Database
from catfeeder_cron.ledger.snapshot import SnapshotReader
from catfeeder_cron.report import JobReport, Outcome
from catfeeder_cron.scheduler.crons import Crons
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.service.endpoints import Page
from catfeeder_cron.service.health import Health
from catfeeder_cron.version import __version__

_PREFIX = "catfeeder_cron_"
_DURATIONS_SECONDS = (0.01, 0.05, 0.25, 1, 5, 15, 60, 300, 900, 3600)
_ACTION_RESULTS = ("done", "retried", "given_up")


class Metrics(RunListener):
    """Counts the runs of this daemon and answers the pages. All methods may be called from any thread."""

    def __init__(self, crons: Crons, database: Database, health: Health) -> None:
        self._crons = crons
        self._database = database
        self._health = health
        self._snapshot = SnapshotReader(database, lambda: list(crons.schedules))
        self._registry = CollectorRegistry()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._runs = self._counter("job_runs", "Runs of this daemon that ended.", "job", "outcome")
        self._removed = self._counter("rows_removed", "Expired rows that were deleted.", "job")
        self._renewed = self._counter("tokens_renewed", "OAuth tokens that were renewed.", "provider")
        self._failing = self._counter("token_renewals_failed", "Requests for tokens that went wrong.", "provider")
        self._needing_login = self._counter(
            "tokens_needing_login", "OAuth tokens whose user has to log in again.", "provider"
        )
        self._actions = self._counter("actions", "Actions that were carried out or tried.", "result")
        self._durations = Histogram(
            f"{_PREFIX}job_duration_seconds",
            "How long runs took.",
            ["job"],
            buckets=_DURATIONS_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_WhenAsked(self._gauges))

    def ended(self, _run: Run, report: JobReport, /) -> None:
        """Count the run and its results."""
        self._runs.labels(report.job, report.outcome).inc()
        self._durations.labels(report.job).observe(report.duration.total_seconds())
        if "deleted" in report.counts:
            self._removed.labels(report.job).inc(report.counts["deleted"])
        if "given_up" in report.counts:  # a job that tries actions
            for result in _ACTION_RESULTS:
                self._actions.labels(result).inc(report.counts.get(result, 0))
        for provider, counts in report.by_provider.items():
            self._renewed.labels(provider).inc(counts.get("renewed", 0))
            self._failing.labels(provider).inc(counts.get("failed", 0))
            self._needing_login.labels(provider).inc(counts.get("needs_reauth", 0))

    def page(self) -> Page:
        """Return the page /metrics."""
        # Every series begins at 0 from the start, so that Prometheus sees the first failure as an increase.
        for job in self._crons.schedules:
            self._durations.labels(job)
            for outcome in get_args(Outcome):
                self._runs.labels(job, outcome)
        text = prometheus_client.generate_latest(self._registry)
        return Page(200, prometheus_client.CONTENT_TYPE_LATEST, text)

    def health(self) -> Page:
        """Return the page /health: the process is alive, or should be restarted."""
        return _answer(self._health.liveness_problems())

    def ready(self) -> Page:
        """Return the page /ready: jobs run as they should, or why not."""
        return _answer(self._health.readiness_problems(self._snapshot.now()))

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, help, labels, registry=self._registry)

    def _gauges(self) -> Iterator[GaugeMetricFamily]:
        now = self._crons.now
        snapshot, schedules = self._snapshot.now(), self._crons.schedules
        running, stuck = self._crons.running, self._crons.stuck
        successes = {job: account.last_success for job, account in snapshot.accounts.items()}
        following = {job: schedule.next_after(now) for job, schedule in schedules.items()}
        yield _gauge("build_info", "The program's version.", "version", {__version__: 1})
        yield _gauge("database_up", "Whether the database answers.", None, {"": int(snapshot.reachable)})
        pool = self._database.pool_use
        waiting = pool.pop("waiting")
        yield _gauge("pool_connections", "The connections of the pool.", "state", pool)
        yield _gauge("pool_requests_waiting", "Requests that wait for a connection.", None, {"": waiting})
        yield _gauge("job_running", "Whether this daemon is running it.", "job", {j: j in running for j in schedules})
        yield _gauge("job_stuck", "Whether a run goes on after its timeout.", "job", {j: j in stuck for j in schedules})
        yield _gauge(
            "job_last_success_timestamp_seconds", "Its last success, by any daemon.", "job", _timestamps(successes)
        )
        yield _gauge("job_next_slot_timestamp_seconds", "When it is due next.", "job", _timestamps(following))


class _WhenAsked(Collector):
    def __init__(self, families: Callable[[], Iterator[GaugeMetricFamily]]) -> None:
        self._families = families

    def collect(self) -> Iterator[GaugeMetricFamily]:
        return self._families()


def _gauge(name: str, help: str, label: str | None, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(_PREFIX + name, help, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


def _timestamps(instants: dict[str, datetime | None]) -> dict[str, float]:
    return {job: instant.timestamp() for job, instant in instants.items() if instant}


def _answer(reasons: list[str]) -> Page:
    body = json.dumps({"status": "failing" if reasons else "ok", "reasons": reasons}, ensure_ascii=False)
    return Page(503 if reasons else 200, "application/json", f"{body}\n".encode())
