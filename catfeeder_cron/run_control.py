"""How a run is asked to end early: by whom, and how the code that runs finds out."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from catfeeder_cron.errors import JobInterrupted, JobTimedOut


class StopRequest:
    """Asks a run to end early. Any thread may set it; the run looks at it between its batches.

    The first reason stays.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        # Held while the reason or the list of callbacks changes, so that no callback is added unseen while it is set.
        # Callbacks are called outside of it: they may take locks of their own.
        self._lock = threading.Lock()
        self._reason: JobInterrupted | None = None
        self._callbacks: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return self._event.is_set()

    @property
    def reason(self) -> JobInterrupted | None:
        """Why the run is to end; None while it is not."""
        return self._reason

    def set(self, reason: JobInterrupted) -> None:
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
        """Inside the `with` block, call `callback` once the request comes, in the thread that sets it, or now if it has
        come already. It must not block.
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
        """Sleep, at most until the request comes. True when it came."""
        return self._event.wait(seconds)

    def raise_if_set(self) -> None:
        if self._reason is not None and self._event.is_set():
            raise self._reason


@dataclass(kw_only=True)
class RunControl:
    """What ends a run: its own time, or others by `stop`; and what it has done by then.

    The thread of the run looks at it and keeps `counts` up to date, so that an early end still tells what was done;
    other threads may ask for the end and for the times.
    """

    timeout: timedelta
    stop: StopRequest = field(default_factory=StopRequest)
    confirm: Callable[[], None] = lambda: None
    """Makes sure that the run still belongs to this process; sets `stop` when it doesn't."""
    counts: Counter[str] = field(default_factory=Counter)
    _started: float = field(default_factory=time.monotonic)

    @property
    def stopping(self) -> bool:
        """Whether the run should end: look between batches and requests."""
        return bool(self.stop) or self.time_left() <= timedelta(0)

    def checkpoint(self) -> None:
        """Raise JobAborted or JobTimedOut when the run should end. Call it where nothing is half done."""
        self.confirm()
        self.raise_if_over()

    def raise_if_over(self) -> None:
        """Do as `checkpoint`, without making sure that the run still belongs to this process."""
        self.stop.raise_if_set()
        self.require_in_time()

    def require_in_time(self) -> None:
        """Raise JobTimedOut when the run's time is used up."""
        if self.time_left() <= timedelta(0):
            raise self.timed_out()

    def start_clock(self) -> None:
        """Let the run's time begin now."""
        self._started = time.monotonic()

    def time_out(self) -> None:
        """Set `stop` because the run's time is used up."""
        self.stop.set(self.timed_out())

    def overdue(self) -> timedelta:
        """How long ago the run's time was used up; negative while it isn't."""
        return -self.time_left()

    def elapsed(self) -> timedelta:
        """How long the run has taken so far."""
        return timedelta(seconds=time.monotonic() - self._started)

    def time_left(self) -> timedelta:
        """Return how much of the run's time is left; negative when it is used up."""
        return self.timeout - self.elapsed()

    def timed_out(self) -> JobTimedOut:
        """Return the error that ends a run whose time is used up."""
        return JobTimedOut(f"longer than its timeout of {self.timeout.total_seconds():g} s")


def is_for_the_program(error: BaseException) -> bool:
    """Whether an exception that comes up in a run is not the run's own, but is to end the program: Ctrl-C, or what the
    program's handler of another signal raises. Python runs those handlers in the main thread, in the midst of anything.
    """
    return isinstance(error, KeyboardInterrupt | SystemExit) and threading.current_thread() is threading.main_thread()


class CallableRun:
    """One call of an operator's callable, as the process that it runs in sees it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._on_stop: Callable[[], object] | None = None
        self._lock = threading.Lock()  # between the thread that is told of the stop and the one that runs the callable
        self.stop_was_seen = False
        """Whether the callable has been answered that it should end."""

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def request_stop(self) -> None:
        with self._lock:
            self._stop.set()
            if self._on_stop is not None:
                self._on_stop()

    @contextmanager
    def on_stop(self, callback: Callable[[], object]) -> Iterator[None]:
        """Inside the `with` block, call `callback` when the stop is requested, or now if it was."""
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
    """Let `stopping` speak of this run, in every thread of this process."""
    global _current
    _current = run


def stopping() -> bool:
    """Whether the job or action that this code runs in should end: its time is up, or the daemon stops.

    It answers in every thread of the process in which a job's `call` or an action's handler runs; False elsewhere. What
    does not end within ten seconds is killed.
    """
    run = _current
    if run is None or not run.stop_requested:
        return False
    run.stop_was_seen = True
    return True
