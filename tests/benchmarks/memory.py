"""The peak memory of `catfeeder-cron run-once clean-tokens`, on a small and on a large table, half of it expired."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.report import Figure
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

_MOST_GROWTH = 1.1

# The kernel's figure for the process itself: the one that its parent gets (ru_maxrss) counts what the parent occupied
# when it forked.
_PROGRAM = """
import atexit, pathlib, sys
from catfeeder_cron.console.cli import main
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text(), file=sys.stderr))
main()
"""


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    small, large = (_peak(sessions, rows) for rows in (scale.small, scale.large))
    yield Figure(
        f"peak memory of run-once, half of {scale.large:,} rows expired",
        f"half of {scale.small:,}: {small:.1f} MB",
        f"{large / small:.2f} of that ({large:.1f} MB)",
        f"the same (at most {_MOST_GROWTH})",
        large <= _MOST_GROWTH * small,
    )


def _peak(sessions: Sessions, rows: int) -> float:
    """In megabytes."""
    with sessions.copy(rows, indexed=True) as url:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, "run-once", "clean-tokens"],
            env={**os.environ, "CATFEEDER_CRON_DATABASE_URL": url},
            capture_output=True,
            text=True,
            check=True,
        )
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", done.stderr, re.MULTILINE)
    return int(kilobytes) / 1024
