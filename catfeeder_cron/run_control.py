"""Ends a run early: its own timeout or another thread requests the stop, and the run looks for the request."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from catfeeder_cron.errors import JobInterrupted, JobTimedOut


class StopRequest:
    """A request to a run to end early. Any thread may set it; the run looks at it between its batches.

    A second request does not change the reason.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        # Held by the thread that sets the reason and by one that adds or removes a callback: a callback that is added
        # while the reason is set is called by one of the two threads. None is called while the lock is held, because
        # callbacks may take locks of their own.
        self._lock = threading.RLock()
        self._reason: JobInterrupted | None = None
        self._callbacks: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return self._event.is_set()

    @property
    def reason(self) -> JobInterrupted | None:
        """Return the reason why the run should end; None as long as it may go on."""
        return self._reason

    def set(self, reason: JobInterrupted) -> None:
        """Request the stop, and call the callbacks in this thread. A second request does nothing."""
        with self._lock:
            if self._event.is_set():
                return
            self._reason = reason
            self._event.set()
            callbacks = list(self._callbacks)
        for call in callbacks:
            call()

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Inside the `with` block, call `callback` when the request comes, in the thread that sets it, or now if it has
        come already. `callback` must not block.
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


@dataclass(kw_only=True)
class RunControl:
    """The timeout, the stop request and the counts of one run.

    The thread of the run looks at it between batches and keeps `counts` up to date, so that the report of a run that
    ends early has them. Other threads may set `stop` and read the times.
    """

    timeout: timedelta
    stop: StopRequest = field(default_factory=StopRequest)
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
