"""The process as a service: what signals ask of it."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from catfeeder_cron.logs import get_logger

log = get_logger(__name__)

_LONGEST_RELOAD_SECONDS = 5


class StopSignals:
    """While entered, SIGTERM and SIGINT set `requested`; a second one ends the process at once.

    For the main thread alone, as Python's signal handlers are.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = threading.Event()

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


class ReloadSignal:
    """While entered, every SIGHUP has `action` called in a thread of its own; several at once may become one."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._hung_up = threading.Event()
        self._leaving = False
        self._thread = threading.Thread(target=self._work, name="reload", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._previous = signal.signal(signal.SIGHUP, lambda _number, _frame: self._hung_up.set())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Ignored from here on: whoever asks for a reload must not end a process that stops in order.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if self._previous is signal.SIG_DFL else self._previous)
        self._leaving = True
        self._hung_up.set()
        self._thread.join(_LONGEST_RELOAD_SECONDS)

    def _work(self) -> None:
        while self._hung_up.wait() and not self._leaving:
            self._hung_up.clear()
            try:
                self._action()
            except Exception:
                log.exception("reload_failed")
