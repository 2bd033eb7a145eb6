"""Imports modules that only some runs need, at their first use, and all of them in one thread.

Where two threads import a package and a part of it for the first time, each can hold the lock that the other wants;
Python 3.13.18 and 3.14.10 then raise _DeadlockError (python/cpython#83065, issue 11), and older versions escape it by
timing alone. So code that imports such a module inside a function calls `load` before.
"""

import os
import sys
import threading
from importlib import import_module
from queue import SimpleQueue
from types import FrameType

_loaded: set[str] = set()

# Held while the importing thread is created, so that only one is. A finalizer that logs may call `load` at any point
# of any thread, in these functions too: so the lock is one that its holder may take again, and the queue a SimpleQueue,
# whose `put` may be called in the middle of a `put`.
_lock = threading.RLock()
_importer: "_Importer | None" = None


def load(*modules: str) -> None:
    """Import these modules, so that an import statement of this thread finds them complete.

    Raises the errors of the import. May be called from any thread at any time.
    """
    for module in modules:
        if module in _loaded:
            continue
        if _is_importing():
            import_module(module)  # it may be the very module that is being imported, and incomplete
        else:
            _load(module)
            _loaded.add(module)


def _is_importing() -> bool:
    """Tell whether this thread is in the middle of an import: it runs a module's code, a finalizer or a signal handler.

    If such a thread waited for the importing thread, that one might wait for the same import: a deadlock.
    """
    if _importer is not None and _importer.is_current:
        return True
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - there is no public way
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _load(module: str) -> None:
    # If this is the only thread, no other can import meanwhile, and the importing thread is not needed.
    alone = threading.enumerate() == [threading.current_thread()]
    importer = None if alone or sys.is_finalizing() else _open_importer()
    if importer is None:
        import_module(module)
    else:
        importer.load(module)


def _open_importer() -> "_Importer | None":
    """Return the importing thread; None when the interpreter ends, and starts no thread any more."""
    global _importer
    with _lock:
        if _importer is None:
            try:
                _importer = _Importer()
            except RuntimeError:
                return None
        return _importer


class _Importer:
    """A thread that imports one module after the other. It lasts as long as the process, which doesn't wait for it.

    Other threads put requests into the queue; the event `done` hands `error` back to the thread that waits for it.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[_Request] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="imports", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Tell whether the calling thread is this one."""
        return threading.current_thread() is self._thread

    def load(self, module: str) -> None:
        """Have the thread import the module, and wait until it has. Raises the errors of the import."""
        request = _Request(module)
        self._requests.put(request)
        request.done.wait()
        if request.error is not None:
            raise request.error

    def _work(self) -> None:
        while True:
            request = self._requests.get()
            try:
                import_module(request.module)
            except BaseException as error:  # noqa: BLE001 - `load` raises it in the thread that asked
                request.error = error
            request.done.set()


class _Request:
    def __init__(self, module: str) -> None:
        self.module = module
        self.error: BaseException | None = None
        self.done = threading.Event()


def _forget_importer() -> None:
    """Begin anew in a forked child: it has none of its parent's threads, and one of them may have held the lock."""
    global _importer, _lock
    _importer, _lock = None, threading.RLock()


os.register_at_fork(after_in_child=_forget_importer)
