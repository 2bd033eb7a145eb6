"""Rows deleted per second, beside one single DELETE of the same rows. They lie in random order over the table."""

import time
from collections.abc import Iterator
from datetime import timedelta
from statistics import median

import psycopg

from tests.benchmarks.report import Figure
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions, age, run

_ROUNDS = 11

_SINGLE_DELETE = 'DELETE FROM "Connections" WHERE expiration_date < now() - %s'


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    cases = (
        ("half of the rows expired, with an index", 0.5, True, 0.9),
        ("half of the rows expired, without an index", 0.5, False, 0.9),
        ("1 in 100 rows expired, with an index", 0.01, True, 0.5),
    )
    for name, share, indexed, target in cases:
        single: list[float] = []
        ours: list[float] = []
        for round_ in range(_ROUNDS):
            turns = [(_single_delete, single), (_run, ours)]
            for way, rates in turns if round_ % 2 else reversed(turns):
                with sessions.copy(scale.rows, indexed=indexed) as url:
                    rates.append(way(url, age(share)))
        ratio = median(ours) / median(single)
        yield Figure(
            f"deleting: {name} ({scale.rows:,} rows)",
            f"one DELETE: {median(single):,.0f} rows/s",
            f"{ratio:.2f} of that ({median(ours):,.0f} rows/s)",
            f"at least {target}",
            ratio >= target,
        )


def _single_delete(url: str, keep_expired_for: timedelta) -> float:
    with psycopg.connect(url, autocommit=True) as connection:
        begun = time.perf_counter()
        rows = connection.execute(_SINGLE_DELETE, [keep_expired_for]).rowcount
        return rows / (time.perf_counter() - begun)


def _run(url: str, keep_expired_for: timedelta) -> float:
    report = run(url, keep_expired_for)
    return report.counts["deleted"] / report.duration.total_seconds()
