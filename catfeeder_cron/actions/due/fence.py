"""Ends an attempt before its lease does, by this process's own clock and without the database.

Another daemon may claim the action when its lease is over. The lease is extended while the handler runs; when that
can't be done (the database is cut off, the statement hangs), the handler is asked to stop, and is dead before the end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from types import coroutine
from typing import Any, TypeVar

from catfeeder_cron.errors import GRACE_SECONDS, PostponedAction
from catfeeder_cron.times import elapsed_seconds

T = TypeVar("T")

# A lease of a minute is extended after 20 s; its handler is asked to stop after 45 s and killed after 55 s. The margin
# is for the killing itself, on a busy machine.
_PART = 6
_MOST_MARGIN_SECONDS = 5.0

NOT_EXTENDED = "its lease could not be extended in time"


class Fence:
    """The times by which an attempt has to end. All methods belong to the thread of the run's event loop."""

    def __init__(self, lease_seconds: float, lease_ends: float) -> None:
        self._margin_seconds = min(_MOST_MARGIN_SECONDS, lease_seconds / _PART)
        self.grace_seconds = min(GRACE_SECONDS, lease_seconds / _PART)
        """How long the handler may take to end after it was asked to stop."""
        self._lease_ends = lease_ends
        self._timeout: asyncio.Timeout | None = None

    @property
    def kill_at(self) -> float:
        """When the handler must be dead, by times.elapsed_seconds."""
        return self._lease_ends - self._margin_seconds

    @property
    def stop_at(self) -> float:
        """When the handler is asked to stop, by times.elapsed_seconds."""
        return self.kill_at - self.grace_seconds

    def extend(self, lease_ends: float) -> None:
        """Put both times off: the lease was extended until `lease_ends`."""
        self._lease_ends = lease_ends
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(self._kill_at_of_loop())

    def require_time(self) -> None:
        """Raise PostponedAction when the handler must not go on."""
        if elapsed_seconds() >= self.kill_at:
            if self._timeout is not None:
                self._timeout.reschedule(None)  # the handler closes what it has opened, and is not to be cancelled then
            raise PostponedAction(NOT_EXTENDED)

    async def perform(self, handler: Callable[[], Awaitable[T]]) -> T:
        """Await what a built-in handler does, and close it at the fence. Raises PostponedAction then."""

        async def steps() -> T:
            return await handler()

        self.require_time()
        try:
            async with asyncio.timeout_at(self._kill_at_of_loop()) as self._timeout:
                return await _step_by_step(steps(), self.require_time)
        except TimeoutError:
            if self._timeout is not None and self._timeout.expired():
                raise PostponedAction(NOT_EXTENDED) from None
            raise

    def _kill_at_of_loop(self) -> float:
        return asyncio.get_running_loop().time() + self.kill_at - elapsed_seconds()


@coroutine
def _step_by_step(steps: Coroutine[Any, Any, T], require: Callable[[], None]) -> Generator[Any, None, T]:
    """Await `steps`, but before each step call `require`; what that raises is raised inside `steps`, which end by it.

    A process that was frozen finds its sockets ready before its timers: without this it would send its request first.
    """
    go_on: Callable[[], Any] = partial(steps.send, None)
    ending = False
    while True:
        try:
            awaited = go_on()
        except StopIteration as stop:
            result: T = stop.value
            return result
        try:
            yield awaited
            if not ending:
                require()
            go_on = partial(steps.send, None)
        except BaseException as error:  # noqa: BLE001 - as `yield from` does
            ending = True
            go_on = partial(steps.throw, error)
