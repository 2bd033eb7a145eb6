"""What it costs that an operator's callable runs in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from statistics import median

from catfeeder_cron.children.pool import Children
from tests.benchmarks.report import Figure, milliseconds
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

_ROUNDS = 15
_CALLS = 200
_MOST_SECONDS = 0.005
# The guard forks once, and what it and the worker import is the rest.
_MOST_STARTS = 8.0

_CALLABLE = "tests.benchmarks.noop:noop"


def measure(_sessions: Sessions, _scale: Scale) -> Iterator[Figure]:
    keys = (str(number) for number in count())
    pythons, new = [], []
    with Children() as children:
        for _ in range(_ROUNDS):
            pythons.append(_python())
            new.append(_call(children, next(keys)))
        there = [_call(children, "there") for _ in range(_CALLS)][1:]
    reference = median(pythons)
    yield Figure(
        "a call in a process that is there",
        f"python -c pass: {milliseconds(reference)}",
        f"{median(there) / reference:.2f} times that ({milliseconds(median(there))})",
        "at most 5 ms",
        median(there) <= _MOST_SECONDS,
    )
    yield Figure(
        "a call in a new process",
        f"python -c pass: {milliseconds(reference)}",
        f"{median(new) / reference:.1f} times that ({milliseconds(median(new))})",
        f"at most {_MOST_STARTS:g} times",
        median(new) <= _MOST_STARTS * reference,
    )


def _python() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=os.environ, check=True)
    return time.perf_counter() - begun


def _call(children: Children, key: str) -> float:
    begun = time.perf_counter()
    children.call(key, _CALLABLE, None, on_line=print).future.result()
    return time.perf_counter() - begun
