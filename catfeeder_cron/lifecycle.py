"""Ends threads and connections when no code closes the object that opened them.

Three things can happen to such an object: it is dropped, its program ends, its process forks. It keeps its
threads and connections in a resource, to which threads and callbacks may refer freely. The resource never refers to the
object, so the object can be dropped at any time.
"""

import _thread
import atexit
import concurrent.futures.thread  # noqa: F401 - its hook has to be registered before ours, so that ours is called first
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.lifecycle")

FORKED = "it was in use before this process was forked, and lives on in the parent alone; make a new one after the fork"

T = TypeVar("T")

# How long the end of a program waits for the threads that let dropped resources go.
_EXIT_SECONDS = 10

# Any thread changes these, by single operations on a set or dict, which are atomic, and never under a lock: a finalizer
# may run in the middle of any code, and so in the thread that holds the lock.
_open: set["Resource"] = set()
_dropped: dict["Resource", threading.Event] = {}
_beginning: set["Resource"] = set()  # dropped ones whose thread has not begun yet
_at_the_end: dict[Callable[[], None], None] = {}  # in the order in which they were added
_told_of_forks: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


class Resource(Protocol):
    """The threads and connections that an object has opened."""

    def ask_to_end(self) -> None:
        """Begin nothing on a schedule any more, and ask running jobs to end, without waiting for them.

        It is called when the main thread has ended. Other threads of the program may go on, and use their connections.
        """

    def wait_for_schedule(self) -> None:
        """Wait for running jobs. Python would wait too, but starts no threads any more then, and jobs may need some."""

    def let_go(self, *, at_exit: bool) -> None:
        """End everything. It may wait for running jobs, because it is called in a thread of its own.

        With `at_exit` it is called in the main thread, when all threads but daemons have ended, and must not wait for
        ever.
        """


def keep(owner: object, resource: Resource) -> Callable[[], None]:
    """Let the resource go when its owner is dropped, or else when the program ends.

    Returns a function that the owner calls when it has closed the resource itself.
    """
    _open.add(resource)
    finalizer = weakref.finalize(owner, _drop, resource)
    finalizer.atexit = False  # see _before_threads_end

    def closed() -> None:
        finalizer.detach()
        _open.discard(resource)

    return closed


def at_exit(call: Callable[[], None]) -> Callable[[], None]:
    """Call this when the program ends, after every resource was let go. Returns a function that takes that back."""
    _at_the_end[call] = None
    return lambda: _at_the_end.pop(call, None)


def after_fork(owner: T, call: Callable[[T], None]) -> None:
    """Call `call` with the owner in every process that is forked from this one, as long as the owner exists.

    In the child only the thread that forked exists, and another thread of the parent may have held any lock: `call`
    must make the owner's locks anew, and must not use sockets or files that it shares with the parent. Later
    registrations are called first.
    """
    _told_of_forks[owner] = call


def wait_for_dropped(most: int = 1, seconds: float = 10) -> None:
    """Wait until no more than `most` dropped resources are being let go, for so many seconds at most.

    Without this, a program that opens and drops objects quickly would pile up threads and connections.
    """
    until = time.monotonic() + seconds
    for gone in list(_dropped.values())[: -most or None]:
        gone.wait(max(0.0, until - time.monotonic()))


def _drop(resource: Resource) -> None:
    """Begin to let a resource go whose owner is dropped.

    A finalizer runs in the thread that drops the last reference or collects garbage, in the middle of any code: it must
    not wait for anything, a lock included. Starting a `threading.Thread` waits until the thread runs.
    """
    if resource in _open:
        _dropped[resource] = threading.Event()
        _beginning.add(resource)
        try:
            _thread.start_new_thread(_begin_to_let_go, (resource,))
        except RuntimeError:  # the system has no further thread: the resource is let go when the program ends
            _beginning.discard(resource)


def _begin_to_let_go(resource: Resource) -> None:
    # We are in a thread that `threading` does not know: the program does not wait for it, and code that asks for the
    # current thread would leave a dummy object behind. The program does wait for this second thread.
    with suppress(RuntimeError):  # as above
        threading.Thread(target=_let_go, args=[resource], name="let-go", daemon=False).start()
    _beginning.discard(resource)


def _let_go(resource: Resource, *, at_exit: bool = False) -> None:
    try:
        _open.remove(resource)
    except KeyError:
        return  # another thread lets it go: `remove` succeeds in one thread alone
    try:
        resource.let_go(at_exit=at_exit)
    except Exception:
        log.exception("resource_not_closed")
    finally:
        if gone := _dropped.pop(resource, None):
            gone.set()


def _before_threads_end() -> None:
    """Ask every resource to end, then wait for its jobs, while threads can still be started.

    atexit calls its functions only when all threads have ended, and the threads of an executor end without a notice to
    its scheduler.
    """
    still_open = list(_open)
    for end in (*(each.ask_to_end for each in still_open), *(each.wait_for_schedule for each in still_open)):
        try:
            end()
        except Exception:
            log.exception("resource_not_stopped")


def _at_exit() -> None:
    for resource in list(_open):
        _let_go(resource, at_exit=True)
    _wait_for_threads()
    for call in list(_at_the_end):
        try:
            call()
        except Exception:
            log.exception("resource_not_closed")


def _wait_for_threads() -> None:
    """Wait for the threads that let resources go, of which Python knows none that was started at the end.

    Python takes the frames of a thread that still runs from under it, and crashes where one is inside psycopg: seen as
    a segmentation fault on a busy machine whose program ended right after a drop (issue 11).
    """
    until = time.monotonic() + _EXIT_SECONDS
    while _beginning and time.monotonic() < until:
        time.sleep(0.001)
    wait_for_dropped(0, max(0.0, until - time.monotonic()))


def _in_forked_child() -> None:
    for owner, call in reversed(list(_told_of_forks.items())):
        try:
            call(owner)
        except Exception:
            log.exception("after_fork_failed")
    _open.clear()
    _dropped.clear()
    _beginning.clear()
    _at_the_end.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_forked_child)
# RuntimeError: the program is ending already. AttributeError: a Python without this; then a task that comes due at the
# program's end is dropped by the executor, and jobs on the schedule are not asked to end.
with suppress(RuntimeError, AttributeError):
    # concurrent.futures uses this function for the same purpose. There is no public way.
    threading._register_atexit(_before_threads_end)  # type: ignore[attr-defined]  # noqa: SLF001
