"""Run all benchmarks, or those that are named, and print a table in Markdown."""

import argparse
import tempfile
import time
from pathlib import Path

from catfeeder_cron.database import embedded
from tests.benchmarks import (
    actions,
    callables,
    deletion_rate,
    ledger,
    memory,
    neighbour,
    nothing_to_do,
    renewal,
    start_up,
)
from tests.benchmarks.report import HEAD
from tests.benchmarks.scale import Scale
from tests.benchmarks.sessions import Sessions

BENCHMARKS = {
    "deletion-rate": deletion_rate.measure,
    "neighbour": neighbour.measure,
    "nothing-to-do": nothing_to_do.measure,
    "memory": memory.measure,
    "renewal": renewal.measure,
    "start-up": start_up.measure,
    "actions": actions.measure,
    "callables": callables.measure,
    "ledger": ledger.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--rows", type=int, default=2_000_000, help="fewer for a quick look (default %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"there is no benchmark {min(unknown)!r}; there are {', '.join(BENCHMARKS)}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="catfeeder-cron-") as folder, embedded.open(Path(folder)) as server:
        sessions, scale = Sessions(server), Scale(arguments.rows)
        print(HEAD, flush=True)
        for name in arguments.names or BENCHMARKS:
            for figure in BENCHMARKS[name](sessions, scale):
                print(figure, flush=True)
    print(f"\nMeasured in {time.monotonic() - begun:.0f} s.")


if __name__ == "__main__":
    main()
