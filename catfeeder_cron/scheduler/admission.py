"""Decides whether a Crons object may begin something: not once it was asked to stop, nor after a fork."""

import threading

from catfeeder_cron import lifecycle
from catfeeder_cron.errors import CatfeederCronError, JobAborted

STOPPING = "the process was asked to stop"
_CLOSED = "this Crons object is closed; make a new one"


class Admission:
    """Whether the object is closed, was asked to stop, or is in use by the process that this one was forked from."""

    def __init__(self) -> None:
        # Held by the thread that begins something, and while the object is marked as closed: nothing begins after
        # that. Its holder may take it again: a signal's handler may ask for a stop at any point.
        self.lock = threading.RLock()
        self.stop_requested = threading.Event()
        self.closed = False
        self._in_use = False
        self._is_the_parents = False

    @property
    def is_the_parents(self) -> bool:
        """Whether the object was in use when this process was forked, and so belongs to the parent alone."""
        return self._is_the_parents

    def use(self) -> None:
        """Note, under the lock, that something begins that has threads or connections.

        Raises JobAborted when the object is closed, CatfeederCronError in a forked process.
        """
        self.refuse_the_parents()
        self.refuse_if_closed()
        self._in_use = True

    def refuse_the_parents(self) -> None:
        """Raise CatfeederCronError if the object belongs to the process that this one was forked from."""
        if self._is_the_parents:
            raise CatfeederCronError(f"this Crons object can't be used: {lifecycle.FORKED}")

    def refuse_if_closed(self) -> None:
        """Raise JobAborted if the object is closed."""
        if self.closed:
            raise JobAborted(_CLOSED)

    def refuse_if_stopping(self) -> None:
        """Raise JobAborted after a stop was requested."""
        if self.stop_requested.is_set():
            raise JobAborted(STOPPING)

    def after_fork(self) -> None:
        """Leave an object in use to the parent; replace locks that a thread may hold which does not exist here."""
        self._is_the_parents = self._is_the_parents or self._in_use
        self.lock = threading.RLock()
        stop_requested = self.stop_requested.is_set()
        self.stop_requested = threading.Event()
        if stop_requested:
            self.stop_requested.set()
