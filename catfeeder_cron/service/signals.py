"""Turn signals into requests: SIGTERM and SIGINT to stop, SIGHUP to read the configuration again."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

from catfeeder_cron import lifecycle
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.service")

_HANDLER_SECONDS = 1
_LONGEST_RELOAD_SECONDS = 5


class StopSignals:
    """While entered, SIGTERM and SIGINT set `requested`; a second one ends the process at once.

    Only the main thread may enter it, as Python allows signal handlers there only. A process that is forked meanwhile
    gets the handlers back that were there before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._entered = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        # Python runs a handler in the main thread, between two of its instructions. A signal that arrives just before
        # the main thread begins to wait, or in another thread, does not end that wait, which may be long. So the
        # signal's number also goes into this pipe, which a thread of its own reads at once.
        read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write_end, False)
        self._previous_end = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=[read_end], name="signals", daemon=True).start()
        self._entered = True
        lifecycle.after_fork(self, StopSignals._after_fork)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._entered:  # false in a forked process, which has left it already
            self._leave(self._previous_end)

    def _after_fork(self) -> None:
        """Leave it in a forked process: through the inherited pipe its signals would reach the parent."""
        if self._entered:
            self._leave(-1)

    def _leave(self, wakeup_end: int) -> None:
        self._entered = False
        signal.set_wakeup_fd(wakeup_end)
        os.close(self._write_end)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_request(self, action: Callable[[], None]) -> None:
        """Call `action` in a new thread as soon as a stop is requested: a handler may take no lock, a thread may."""

        def wait() -> None:
            self.requested.wait()
            action()

        threading.Thread(target=wait, name="stop", daemon=True).start()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.requested.set()

    def _read(self, read_end: int) -> None:
        """Read the numbers of arriving signals in a thread, until the writing end is closed."""
        with open(read_end, "rb", buffering=0) as arrived:
            while numbers := arrived.read(64):
                # Wait for the handler, if it can run soon: until it has run, a second signal would not end the process.
                if any(number in numbers for number in self.SIGNALS) and not self.requested.wait(_HANDLER_SECONDS):
                    self.requested.set()


class ReloadSignal:
    """While entered, a SIGHUP calls `action` in the thread of this object; several at once may become one call.

    The handler, in the main thread, only sets an event, because it may interrupt code that holds a lock.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        # Set by the handler in the main thread; the reload's thread waits for it, and clears it before it reloads, so
        # that a signal during a reload causes one more.
        self._hung_up = threading.Event()
        self._leaving = False
        self._entered = False
        self._thread = threading.Thread(target=self._work, name="reload", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._previous = signal.signal(signal.SIGHUP, lambda _number, _frame: self._hung_up.set())
        self._entered = True
        lifecycle.after_fork(self, ReloadSignal._after_fork)
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._entered:  # in a forked process
            return
        # Ignored from here on: a request for a reload must not end a process that is stopping in order.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if self._previous is signal.SIG_DFL else self._previous)
        self._entered = False
        self._leaving = True
        self._hung_up.set()
        self._thread.join(_LONGEST_RELOAD_SECONDS)

    def _after_fork(self) -> None:
        if self._entered:
            self._entered = False
            signal.signal(signal.SIGHUP, self._previous)

    def _work(self) -> None:
        while self._hung_up.wait() and not self._leaving:
            self._hung_up.clear()
            try:
                self._action()
            except Exception:
                log.exception("reload_failed")
