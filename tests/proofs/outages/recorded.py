"""Jobs that write down when they are at work, on the clock that all processes of this machine share.

Tests copy this file to where the daemons find it, and read the file `seen` beside it.
"""

import json
import os
import time
from pathlib import Path

import catfeeder_cron

_PAUSE = 0.1


def _see(job: str, run: str) -> None:
    """Note that a run is at work now: appending so little is atomic."""
    entry = {"job": job, "run": run, "at": time.clock_gettime(time.CLOCK_MONOTONIC), "by": os.environ["RECORDED_AS"]}
    with Path(__file__).with_name("seen").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def polite(job: str, seconds: float) -> None:
    """Work for so long, or until told to stop."""
    _work(job, seconds, heeds=True)


def deaf(job: str, seconds: float) -> None:
    """Work for so long, whatever one is told."""
    _work(job, seconds, heeds=False)


def _work(job: str, seconds: float, heeds: bool) -> None:
    run = f"{os.environ['RECORDED_AS']}/{os.getpid()}/{time.monotonic_ns()}"
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (heeds and catfeeder_cron.stopping()):
        _see(job, run)
        time.sleep(_PAUSE)
    _see(job, run)
