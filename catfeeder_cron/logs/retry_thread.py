"""A thread that tries again to write log lines, so that nothing has to wait for the next line."""

import _thread
import threading
import time
from collections.abc import Callable

_TRY_AGAIN_SECONDS = 1.0


class RetryThread:
    """Calls a function once a second under the caller's lock, until it returns True. `start` is called under that lock.

    There is no more than one thread at a time, and none while there is nothing to try.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        # Under the lock, so that a `start` comes before the last call of the function or begins another thread; only
        # `_start_thread` clears it without the lock, when there is no thread.
        self._is_started = False

    def start(self, is_done: Callable[[], bool]) -> None:
        """Begin to call the function, unless that has begun. Where no thread can be started, the next call tries."""
        if not self._is_started:
            # The code that logs may be a finalizer's, inside a function of `threading` that holds that module's lock.
            self._is_started = True
            try:
                _thread.start_new_thread(self._start_thread, (is_done,))
            except RuntimeError:  # no further thread
                self._is_started = False

    def _start_thread(self, is_done: Callable[[], bool]) -> None:
        # In a thread that `threading` does not know, making a log record would leave a dummy object behind.
        try:
            threading.Thread(target=self._work, args=(is_done,), name="log", daemon=True).start()
        except RuntimeError:
            self._is_started = False

    def _work(self, is_done: Callable[[], bool]) -> None:
        while True:
            time.sleep(_TRY_AGAIN_SECONDS)
            with self._lock:
                if is_done():
                    self._is_started = False
                    return
