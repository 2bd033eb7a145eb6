"""Watches over the process that runs an operator's callable, from outside of it, and ends everything that it started.

The guard needs no cooperation of the callable, which may hold the interpreter's lock, block signals, close descriptors
or leave processes behind. Every process that the worker starts stays the guard's descendant, even when it detaches
itself, because the guard adopts orphans (PR_SET_CHILD_SUBREAPER). The guard ends as the worker ended (exit status or
signal), so the daemon sees one process.
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# The guard compares a deadline with the clock this often: no timer runs while a machine is suspended.
_LOOK_SECONDS = 1.0
_NEVER = float("inf")
# The guard waits this long for a process that can't be killed: another user's, or one that hangs in the kernel.
_KILL_SECONDS = 5.0
# When memory runs out the kernel is to kill the callable, not the daemon.
_OOM_SCORE = "500"


def main(parent: int, control: int, work: Callable[[], NoReturn]) -> NoReturn:
    """Fork, call `work` in the new process, and watch over it.

    `parent` is the daemon's process id. Each line that comes from the descriptor `control` gives the time at which the
    guard kills everything, in seconds on the clock that goes on while the machine is suspended (inf: never); or it is
    "kill". The end of the pipe alone would not do: a process that the daemon's program forks holds it open, too.
    """
    _die_with(parent, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    alarm, alarm_write = os.pipe()
    worker = os.fork()
    if worker == 0:
        for end in (control, alarm, alarm_write):
            os.close(end)
        os.setsid()  # a callable that kills its process group must not reach the guard
        _die_with(guard, signal.SIGKILL)
        _be_first_when_memory_runs_out()
        work()
    for number in range(3):  # the daemon is to see the end of these pipes when the worker has closed its copies
        os.close(number)
    _Guard(worker, control, alarm, alarm_write).watch()


class _Guard:
    """A loop in the process's only thread. Python writes each signal's number into the pipe `alarm`, which wakes it."""

    def __init__(self, worker: int, control: int, alarm: int, alarm_write: int) -> None:
        self._worker = worker
        self._control = control
        self._alarm = alarm
        self._deadline = _NEVER
        self._read = b""
        self._poll = select.poll()  # `select` takes no descriptor from 1024 on
        for descriptor in (control, alarm):
            self._poll.register(descriptor, select.POLLIN)
        os.set_blocking(alarm_write, False)
        signal.set_wakeup_fd(alarm_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)

    def watch(self) -> NoReturn:
        """Wait for the worker's end, the deadline, SIGTERM or the daemon's end; kill all descendants, and end."""
        while True:
            status = _reap(self._worker)
            if status is not None:
                _kill_descendants()
                _end_like(status)
            wait = None if self._deadline == _NEVER else 1000 * min(max(self._left(), 0.0), _LOOK_SECONDS)
            ready = {descriptor for descriptor, _ in self._poll.poll(wait)}
            if self._alarm in ready and signal.SIGTERM in os.read(self._alarm, 64):
                break
            if self._control in ready and not self._take_orders():
                break
            # After the orders: one that came in time has moved the deadline, however late this process is.
            if self._left() <= 0:
                _kill_descendants()
                _die_by(signal.SIGALRM)
        _kill_descendants()
        _die_by(signal.SIGTERM)

    def _take_orders(self) -> bool:
        """Read the next deadlines; return False when everything is to be killed, or the daemon is gone."""
        read = os.read(self._control, 4096)
        *lines, self._read = (self._read + read).split(b"\n")
        if not read or b"kill" in lines:
            return False
        for line in lines:
            self._deadline = float(line)
        return True

    def _left(self) -> float:
        return self._deadline - _elapsed_seconds()


def _elapsed_seconds() -> float:
    """Return seconds on a clock that goes on while the machine is suspended: a lease grows old by it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _reap(worker: int) -> int | None:
    """Reap every process that has ended; return the worker's status if it is one of them."""
    found = None
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == worker:
                found = status
    return found


def _kill_descendants() -> None:
    """Kill and reap until no descendant is left. New ones may start meanwhile: each becomes a child of ours at last."""
    until = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < until:
        for pid in _descendants():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _descendants() -> list[int]:
    """Return the processes that descend from this one, as far as /proc shows them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - a Path for every process would cost more than all the rest
        if name.isdecimal():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - as above
                # "pid (name) state ppid ...": the name may hold blanks and parentheses.
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, ahead = [], [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        _die_by(os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _die_by(number: int) -> NoReturn:
    import resource

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left its own, if any
    with suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # where the signal is blocked


def _be_first_when_memory_runs_out() -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - pathlib takes a while
        file.write(_OOM_SCORE)


def _die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send us a signal when `parent` ends; end now if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(0)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
