"""Handlers as an operator could write them. What they do is seen in files, by whatever process it is done."""

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from catfeeder_cron import HopelessAction, PostponedAction, stopping
from catfeeder_cron.actions.action import Action


def note(action: Action) -> str:
    """Add a line to the file that the payload names: appending so little is atomic."""
    with Path(action.payload["file"]).open("a") as file:
        file.write(f"{action.id} {action.attempt} {action.key}\n")
    return "noted"


async def note_later(action: Action) -> None:
    await asyncio.sleep(0.01)
    note(action)


def noop(action: Action) -> None:
    pass


def fail(action: Action) -> None:
    note(action)
    raise ValueError("it did not work")


def hopeless(action: Action) -> None:
    raise HopelessAction("no such cat")


def postponed(action: Action) -> None:
    raise PostponedAction("the feeder is being cleaned", 3000)


def wait_for(action: Action) -> None:
    """Note, then last until the file that the payload names is there."""
    note(action)
    while not Path(action.payload["until"]).exists():
        time.sleep(0.01)


def until_stopped(action: Action) -> None:
    note(action)
    while not stopping():
        time.sleep(0.01)


def beat(action: Action) -> None:
    """Write the time into the file that the payload names, again and again, for as long as the process lives."""
    with Path(action.payload["beats"]).open("a", buffering=1) as file:
        while True:
            file.write(f"{time.time()}\n")
            time.sleep(0.01)


def beat_until_stopped(action: Action) -> None:
    with Path(action.payload["beats"]).open("a", buffering=1) as file:
        while not stopping():
            file.write(f"{time.time()}\n")
            time.sleep(0.01)


def kill(action: Action) -> None:
    note(action)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(action: Action) -> None:
    note(action)
    os._exit(3)


def resign(action: Action) -> None:
    note(action)
    sys.exit(4)


def freeze(action: Action) -> None:
    note(action)
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(action: Action) -> None:
    """Hold the interpreter's lock for good, deaf to every signal."""
    note(action)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(1_000_000)


def scribble(action: Action) -> None:
    """Write what could be taken for an answer, and read what could be taken for a question."""
    print('{"outcome": "hopeless", "detail": "not me"}', flush=True)
    os.write(1, b'{"outcome": "hopeless", "detail": "not me"}\n')
    sys.stdin.read()
    note(action)


def generate(action: Action) -> Iterator[int]:
    yield 1


def garble(action: Action) -> str:
    """Return a text that PostgreSQL can't hold: a NUL, and half a surrogate pair."""
    note(action)
    return "a cat\0 and \udcff"
