"""Signals that ask for a stop, whatever the main thread does when they arrive."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from catfeeder_cron.service.signals import StopSignals
from tests.support.waiting import SOON


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    with StopSignals() as signals:
        yield signals


def join_readers() -> None:
    """Insist on the end of the threads that read which signals arrive."""
    for thread in [thread for thread in threading.enumerate() if thread.name == "signals"]:
        thread.join(SOON)
        assert not thread.is_alive()


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_stop_is_asked_for_though_nothing_interrupts_the_main_threads_wait(
    signals: StopSignals, number: signal.Signals
) -> None:
    """Sent to another thread, a signal finds the main thread as one does that comes just before it begins to wait."""
    stopping = threading.Event()
    signals.on_request(stopping.set)

    threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), number)).start()

    assert stopping.wait(SOON)
    assert signal.getsignal(number) is signal.SIG_DFL, "a second one ends the process at once"


def test_another_signal_asks_for_nothing() -> None:
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        join_readers()
        assert not signals.requested.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_all_is_as_before() -> None:
    before = [signal.getsignal(number) for number in StopSignals.SIGNALS]
    with StopSignals(), StopSignals():
        pass
    assert [signal.getsignal(number) for number in StopSignals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    join_readers()


FORKS = """
import os, signal, sys, time
from catfeeder_cron.service.signals import ReloadSignal, StopSignals

def tell(*found):
    print(*found, flush=True)  # what is left in the buffer, a forked process tells again

ready, told = os.pipe()
with StopSignals(), StopSignals() as signals, ReloadSignal(lambda: tell("reloads")):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        child = os.fork()
        if child == 0:
            os.write(told, b"!")
            time.sleep(300)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, number)
        tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number)
    child = os.fork()
    if child == 0:
        sys.exit()  # leaves the blocks
    tell(os.waitpid(child, 0)[1], signals.requested.wait(0.5))
    os.kill(os.getpid(), signal.SIGTERM)
    tell(signals.requested.wait(60))
"""


def test_a_signal_that_a_forked_process_gets_is_its_own() -> None:
    """A pool of processes that is terminated, say, must not stop the daemon that has forked it."""
    options = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    ended = subprocess.run(
        [sys.executable, *options, "-c", FORKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout.splitlines()) == (0, ["True", "True", "True", "0 False", "True"])
