"""How long somebody waits who writes rows that are about to be deleted, beside one single DELETE of half the rows.

The neighbour is a process that updates expired rows chosen at random, one transaction each, without a pause.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import psycopg

from tests.benchmarks.report import Figure, milliseconds, percentile
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions, run

_ROUNDS = 5
_WARM_UP_SECONDS = 0.5

_EXPIRED = 'SELECT id FROM "Connections" WHERE expiration_date < now() ORDER BY random() LIMIT 50000'
_WRITE = 'UPDATE "Connections" SET edit_date = now() WHERE id = %s'

Wait = tuple[float, float]
"""When an update was begun and when it was done."""


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    single: list[list[float]] = []
    ours: list[list[float]] = []
    for round_ in range(_ROUNDS):
        turns = [(_single_delete, single), (_run, ours)]
        for way, waits in turns if round_ % 2 else reversed(turns):
            with sessions.copy(scale.rows, indexed=True) as url:
                waits.append(_waits(url, way))
    worst = [median(max(waits) for waits in each) for each in (single, ours)]
    usual = [median(percentile(waits, 0.99) for waits in each) for each in (single, ours)]
    yield Figure(
        f"worst wait of a neighbour, half of {scale.rows:,} rows expired",
        f"one DELETE: {milliseconds(worst[0])} (99th percentile {milliseconds(usual[0])})",
        f"1/{worst[0] / worst[1]:.0f} of that: {milliseconds(worst[1])} (99th percentile {milliseconds(usual[1])})",
        "at most 1/8",
        worst[1] <= worst[0] / 8,
    )


def _waits(url: str, delete: Callable[[str], Any]) -> list[float]:
    """Return how long, in seconds, each update took that was under way during the deletion."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    neighbour = spawn.Process(target=_write_until_told, args=(url, theirs))
    neighbour.start()
    ours.recv()
    time.sleep(_WARM_UP_SECONDS)
    begun = time.perf_counter()
    delete(url)
    ended = time.perf_counter()
    ours.send("enough")
    waits: list[Wait] = ours.recv()
    neighbour.join()
    return [until - since for since, until in waits if until > begun and since < ended]


def _write_until_told(url: str, parent: "Connection[Any, Any]") -> None:
    waits: list[Wait] = []
    with psycopg.connect(url, autocommit=True) as connection:
        rows = connection.execute(_EXPIRED).fetchall()
        parent.send("ready")
        while not parent.poll():
            since = time.perf_counter()
            connection.execute(_WRITE, rows[len(waits) % len(rows)])
            waits.append((since, time.perf_counter()))
    parent.send(waits)


def _single_delete(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute('DELETE FROM "Connections" WHERE expiration_date < now()')


def _run(url: str) -> None:
    run(url, timedelta(0))
