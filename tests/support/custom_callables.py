"""What jobs of one's own may call: the good, the odd and the ugly. Tests copy this file to where processes find it."""

import asyncio
import json
import logging
import logging.config
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import catfeeder_cron


def see(what: Any) -> None:
    """Note something: appending so little is atomic."""
    with Path(__file__).with_name("seen").open("a") as file:
        file.write(json.dumps(what, default=str) + "\n")


def note(*args: Any, **kwargs: Any) -> None:
    see([args, kwargs])
    kwargs.get("list", []).append("changed")


def kinds(*args: Any) -> None:
    see([type(each).__name__ for each in args])


async def note_later(what: str) -> None:
    await asyncio.sleep(0)
    see(what)


class Awaitable:
    def __await__(self) -> Generator[None, None, None]:
        see("awaited")
        yield from ()


def awaitable() -> Awaitable:
    return Awaitable()


def generator() -> Iterator[None]:
    see("never")
    yield


async def async_generator() -> AsyncIterator[None]:
    see("never")
    yield


def fail() -> NoReturn:
    raise ValueError("no\ncat")


class Unheard(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("its text can't be had")


def fail_unheard_of() -> NoReturn:
    raise Unheard


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


async def cancelled() -> NoReturn:
    raise asyncio.CancelledError


def leave(status: Any) -> NoReturn:
    sys.exit(status)


def quit_at_once(status: int) -> NoReturn:
    os._exit(status)


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def crash() -> None:
    kill_itself(signal.SIGSEGV)


def run_out_of_memory() -> None:
    raise MemoryError


def speak() -> None:
    print("one\ntwo")
    sys.stderr.write("three\n")
    logging.getLogger("reports").warning("four")
    thread = threading.Thread(target=print, args=("five",))
    thread.start()
    thread.join()
    subprocess.run(["echo", "six"], check=True)
    try:
        raise ValueError("seven")
    except ValueError:
        logging.getLogger("reports").exception("failed, but went on")


def mutter() -> None:
    for _ in range(20_000):
        sys.stdout.write(".")


def until_stopped() -> None:
    see("begun")
    while not catfeeder_cron.stopping():
        time.sleep(0.01)


def until_a_thread_sees_the_stop() -> None:
    see("begun")

    def look() -> None:
        while not catfeeder_cron.stopping():
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()


def deaf(seconds: float) -> None:
    see("begun")
    time.sleep(seconds)
    see("done")


async def patient() -> None:
    see("begun")
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        see("cleaned up")


async def stubborn() -> None:
    for _ in range(2):
        try:
            see("begun")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass


def never_end() -> None:
    """Leave processes everywhere, one of them detached from all that could be known of it, and don't come back."""
    children = [
        subprocess.Popen(["sleep", "1000"]),
        subprocess.Popen(["sleep", "1000"], start_new_session=True),
    ]
    detached = subprocess.run(
        ["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"], check=True, capture_output=True, text=True
    )
    see([os.getpid(), *(child.pid for child in children), int(detached.stdout)])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        time.sleep(1000)


def leave_behind() -> None:
    """Come back, while a thread and a process that were started go on."""
    threading.Thread(target=time.sleep, args=(1000,)).start()
    see([os.getpid(), subprocess.Popen(["sleep", "1000"], start_new_session=True).pid])


def whoami() -> None:
    see(os.getpid())


def close_the_streams() -> None:
    sys.stdout.close()
    sys.stderr.close()


def close_everything() -> None:
    os.closerange(0, 100)


def silence() -> None:
    logging.config.dictConfig({"version": 1})


def first(function: str) -> None:
    """Call another function of this module at the first run, and `speak` at the next ones."""
    if Path(__file__).with_name("seen").exists():
        speak()
    else:
        see(os.getpid())
        globals()[function]()


def use_a_pool() -> None:
    with multiprocessing.Pool(2) as pool:
        see(pool.map(abs, [-1, -2]))


def fork_and_kill() -> None:
    """End a child process of its own, which has inherited all that this one had open."""
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    os.kill(child, signal.SIGTERM)
    see(os.waitpid(child, 0)[1])


def fork_and_come_back() -> None:
    """Forget that the child process of a fork comes back, too."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        see("parent")


class Namespace:
    @staticmethod
    def inner() -> None:
        see("inner")


number = 7
now = datetime.now
