"""Ends a run early: its own timeout or another thread requests the stop, and the run looks for the request."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from catfeeder_cron.errors import GRACE_SECONDS, JobInterrupted, JobTimedOut
from catfeeder_cron.times import elapsed_seconds


class StopRequest:
    """A request to a run to end early. Any thread may set it; the run looks at it between its batches.

    A second request does not change the reason, but it may shorten the grace.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        # Held by the thread that sets the reason and by one that adds or removes a callback: a callback that is added
        # while the reason is set is called by one of the two threads. None is called while the lock is held, because
        # callbacks may take locks of their own.
        self._lock = threading.RLock()
        self._reason: JobInterrupted | None = None
        self._grace_seconds = GRACE_SECONDS
        self._grace_ends = float("inf")
        self._callbacks: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return self._event.is_set()

    @property
    def reason(self) -> JobInterrupted | None:
        """Return the reason why the run should end; None as long as it may go on."""
        return self._reason

    @property
    def grace_seconds(self) -> float:
        """Return how long what the run has started may take to end, from the request on that leaves it the least."""
        return self._grace_seconds

    @property
    def grace_left_seconds(self) -> float:
        """Return how much of that time is left; infinite before any request."""
        return max(0.0, self._grace_ends - elapsed_seconds())

    def set(self, reason: JobInterrupted) -> None:
        """Request the stop, and call the callbacks in this thread.

        A second request only calls them again if its grace ends earlier; else it does nothing.
        """
        with self._lock:
            grace_ends = elapsed_seconds() + reason.grace_seconds
            if grace_ends >= self._grace_ends:
                return
            self._grace_seconds, self._grace_ends = reason.grace_seconds, grace_ends
            self._reason = self._reason or reason
            self._event.set()
            callbacks = list(self._callbacks)
        for call in callbacks:
            call()

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Inside the `with` block, call `callback` when the request comes, in the thread that sets it, or now if it has
        come already; again for a request with a shorter grace. `callback` must not block.
        """
        with self._lock:
            self._callbacks.append(callback)
            is_set = self._event.is_set()
        if is_set:
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)

    def wait(self, seconds: float) -> bool:
        """Sleep for so many seconds, at most until the request comes. Return whether it came."""
        return self._event.wait(seconds)

    def raise_if_set(self) -> None:
        """Raise the reason if the stop was requested."""
        if self._reason is not None and self._event.is_set():
            raise self._reason


class Deadline:
    """When all that a run has started in other processes is to be dead, whatever becomes of this process until then.

    Any thread may set it. The guard of each process knows it (see children/guard.py) and needs nobody to enforce it.
    """

    def __init__(self) -> None:
        # Held by the thread that sets the time, and by one that adds or removes a callback, while they call callbacks,
        # too: of two times that are set at once the callbacks get the one that stays last.
        self._lock = threading.RLock()
        self._at = float("inf")
        self._callbacks: list[Callable[[float], None]] = []

    @property
    def at(self) -> float:
        """Return the time, by times.elapsed_seconds; infinite before any was set."""
        return self._at

    def set(self, at: float) -> None:
        """Set the time, by times.elapsed_seconds, and call the callbacks with it in this thread."""
        with self._lock:
            self._at = at
            for call in self._callbacks:
                call(at)

    @contextmanager
    def calling(self, callback: Callable[[float], None]) -> Iterator[None]:
        """Inside the `with` block, call `callback` with the time, now and whenever another is set.

        `callback` must not block.
        """
        with self._lock:
            self._callbacks.append(callback)
            callback(self._at)
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


@dataclass(kw_only=True)
class RunControl:
    """The timeout, the stop request and the counts of one run.

    The thread of the run looks at it between batches and keeps `counts` up to date, so that the report of a run that
    ends early has them. Other threads may set `stop` and read the times.
    """

    timeout: timedelta
    stop: StopRequest = field(default_factory=StopRequest)
    deadline: Deadline = field(default_factory=Deadline)
    """For what the run has started in other processes; whoever knows that the run goes on puts it off."""
    confirm: Callable[[], None] = lambda: None
    """Checks that the run still belongs to this process, and sets `stop` when it doesn't."""
    counts: Counter[str] = field(default_factory=Counter)
    application_name: str | None = None
    """Names the run to the server, so that other processes can tell whether a statement of it is still at work."""
    _started: float = field(default_factory=time.monotonic)

    @property
    def stopping(self) -> bool:
        """Tell whether the run should end. Read it between batches and requests."""
        return bool(self.stop) or self.time_left() <= timedelta(0)

    def checkpoint(self) -> None:
        """Raise JobAborted or JobTimedOut when the run should end. Call it where no work is half done."""
        self.confirm()
        self.raise_if_over()

    def raise_if_over(self) -> None:
        """Raise as `checkpoint` does, without checking that the run still belongs to this process."""
        self.stop.raise_if_set()
        self.require_in_time()

    def require_in_time(self) -> None:
        """Raise JobTimedOut when the run's time is used up."""
        if self.time_left() <= timedelta(0):
            raise self.timed_out()

    def start_clock(self) -> None:
        """Measure the run's time from now on."""
        self._started = time.monotonic()

    def time_out(self) -> None:
        """Set `stop` because the run's time is used up."""
        self.stop.set(self.timed_out())

    def overdue(self) -> timedelta:
        """Return how long ago the run's time was used up; negative while it isn't."""
        return -self.time_left()

    def elapsed(self) -> timedelta:
        """Return how long the run has taken so far."""
        return timedelta(seconds=time.monotonic() - self._started)

    def time_left(self) -> timedelta:
        """Return how much of the run's time is left; negative when it is used up."""
        return self.timeout - self.elapsed()

    def timed_out(self) -> JobTimedOut:
        """Return the error that ends a run whose time is used up."""
        return JobTimedOut(f"longer than its timeout of {self.timeout.total_seconds():g} s")


def is_for_the_program(error: BaseException) -> bool:
    """Tell whether an exception in a run is meant to end the program, not the run: a signal handler raised it.

    Python calls signal handlers in the main thread, in the middle of any code; that of Ctrl-C raises KeyboardInterrupt.
    """
    return isinstance(error, KeyboardInterrupt | SystemExit) and threading.current_thread() is threading.main_thread()


class CallableRun:
    """One call of an operator's callable, in the process that it runs in."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._on_stop: Callable[[], object] | None = None
        # Held by the worker's thread "calls" while it requests the stop, and by the callable's thread while it sets
        # `_on_stop`: if both happen at once, the callback is called exactly once.
        self._lock = threading.Lock()
        self.stop_was_seen = False
        """Whether `stopping` has returned True to the callable, or its coroutine was cancelled."""

    @property
    def stop_requested(self) -> bool:
        """Tell whether the callable should end."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Request the stop, and call the callback in this thread."""
        with self._lock:
            self._stop.set()
            if self._on_stop is not None:
                self._on_stop()

    @contextmanager
    def on_stop(self, callback: Callable[[], object]) -> Iterator[None]:
        """Inside the `with` block, call `callback` when the stop is requested, or now if it was requested before."""
        with self._lock:
            self._on_stop = callback
            if self._stop.is_set():
                callback()
        try:
            yield
        finally:
            with self._lock:
                self._on_stop = None


_current: CallableRun | None = None


def enter_callable_run(run: CallableRun) -> None:
    """Have `stopping` answer for this run from now on, in every thread of this process."""
    global _current
    _current = run


def stopping() -> bool:
    """Tell whether the job or action that this code runs in should end: its time is up, or the daemon stops.

    It works in every thread of the process in which a job's `call` or an action's handler runs, and returns False
    elsewhere. A callable that does not end within ten seconds after the request is killed.
    """
    run = _current
    if run is None or not run.stop_requested:
        return False
    run.stop_was_seen = True
    return True
