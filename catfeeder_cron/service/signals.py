"""What signals ask of the process: to stop, to read its configuration again."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from catfeeder_cron import lifecycle
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.service")

_HANDLER_SECONDS = 1
_LONGEST_RELOAD_SECONDS = 5


class StopSignals:
    """While entered, SIGTERM and SIGINT set `requested`; a second one ends the process at once.

    For the main thread alone, as Python's signal handlers are. A process that is forked meanwhile has the handlers that
    were there before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._entered = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        # A handler runs when the main thread comes to it. A signal that arrives just before that begins to wait, or in
        # another thread, interrupts nothing, and the wait may be long; what is written here is read at once.
        read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write_end, False)
        self._previous_end = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=[read_end], name="signals", daemon=True).start()
        self._entered = True
        lifecycle.after_fork(self, StopSignals._after_fork)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:  # not in a forked process
            self._leave(self._previous_end)

    def _after_fork(self) -> None:
        """Let go of what a forked process has inherited: the pipe would bring its signals to the parent."""
        if self._entered:
            self._leave(-1)

    def _leave(self, wakeup_end: int) -> None:
        self._entered = False
        signal.set_wakeup_fd(wakeup_end)
        os.close(self._write_end)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_request(self, action: Callable[[], None]) -> None:
        """Call `action` in a thread of its own as soon as a stop is asked for: a handler must take no lock."""

        def wait() -> None:
            self.requested.wait()
            action()

        threading.Thread(target=wait, name="stop", daemon=True).start()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.requested.set()

    def _read(self, read_end: int) -> None:
        """Take in the numbers of the signals that arrive, until the writing end is closed."""
        with open(read_end, "rb", buffering=0) as arrived:
            while numbers := arrived.read(64):
                # The handler comes first where it can: until it has run, a second signal would be one with the first.
                if any(number in numbers for number in self.SIGNALS) and not self.requested.wait(_HANDLER_SECONDS):
                    self.requested.set()


class ReloadSignal:
    """While entered, every SIGHUP has `action` called in a thread of its own; several at once may become one."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._entered:  # in a forked process
            return
        # Ignored from here on: whoever asks for a reload must not end a process that stops in order.
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
