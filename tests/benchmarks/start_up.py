"""How long commands take that people wait for, beside the bare import of the library that reads the command line."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

from tests.benchmarks.report import Figure, milliseconds
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

_ROUNDS = 15

_IMPORT = ("-c", "import typer")
_HELP = ("-m", "catfeeder_cron", "--help")
_LIST = ("-m", "catfeeder_cron", "list")


def measure(sessions: Sessions, scale: Scale) -> Iterator[Figure]:
    with sessions.copy(scale.small, indexed=True) as url:
        environment = {**os.environ, "CATFEEDER_CRON_DATABASE_URL": url}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        seconds: dict[tuple[str, ...], list[float]] = {command: [] for command in (_IMPORT, _HELP, _LIST)}
        for command in seconds:
            _time(command, environment)  # compiles the bytecode
        for _ in range(_ROUNDS):
            for command, each in seconds.items():
                each.append(_time(command, environment))
    reference = median(seconds[_IMPORT])
    for name, command, target in (("--help", _HELP, 2.5), ("list", _LIST, 6.0)):
        ratio = median(seconds[command]) / reference
        yield Figure(
            f"catfeeder-cron {name}",
            f"python -c 'import typer': {milliseconds(reference)}",
            f"{ratio:.1f} times that ({milliseconds(median(seconds[command]))})",
            f"at most {target:g} times",
            ratio <= target,
        )


def _time(command: tuple[str, ...], environment: dict[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun
