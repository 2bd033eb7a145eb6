"""What a run costs that finds nothing, on a small and on a large table with an index."""

from collections.abc import Iterator
from statistics import median

from tests.benchmarks.report import Figure, milliseconds
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import SPREAD, Sessions, run

_ROUNDS = 11
_MOST_SECONDS = 0.020


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    small, large = (_durations(sessions, rows) for rows in (scale.small, scale.large))
    yield Figure(
        f"nothing to do among {scale.large:,} rows, with an index",
        f"among {scale.small:,} rows: {milliseconds(median(small))}",
        f"{milliseconds(median(large))} (at worst {milliseconds(max(large))})",
        "at most 20 ms",
        median(large) <= _MOST_SECONDS,
    )


def _durations(sessions: Sessions, rows: int) -> list[float]:
    with sessions.copy(rows, indexed=True) as url:
        return [run(url, 2 * SPREAD).duration.total_seconds() for _ in range(_ROUNDS)]
