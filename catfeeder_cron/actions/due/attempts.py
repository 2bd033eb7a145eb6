"""Run the attempts of a run in an event loop with a thread of its own, so that no attempt waits for another."""

import asyncio
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

from catfeeder_cron import logs
from catfeeder_cron.actions.due.handlers import Handlers
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.errors import HopelessAction, PostponedAction
from catfeeder_cron.logs import get_logger, one_line
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.actions")

# Attempts that end within this time of each other are stored together.
_GATHER_SECONDS = 0.001

Verdict = Literal["done", "retried", "failed", "cancelled"]


@dataclass(frozen=True)
class Finished:
    """How an attempt ended. The database turns "retried" into "failed" after the last attempt."""

    claimed: Claimed
    verdict: Verdict
    detail: str | None = None
    after_seconds: float = 0
    at: float = field(default_factory=elapsed_seconds)
    """When it ended, by times.elapsed_seconds."""
    begun_as: str | None = None
    """The owner of the lease under which it ran, where that is not the lease under which it is stored."""


class Attempts:
    """Performs actions from `__enter__` to `__exit__`, which cancels those still under way."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        # The run's thread makes this object and calls its public methods. The tasks and the handlers belong to the
        # thread of the event loop, and call_soon_threadsafe hands work over to it; this queue brings results back.
        self._finished: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._tasks: dict[Any, asyncio.Task[Finished]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="actions", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def begin(self, claimed: list[Claimed]) -> None:
        """Begin to perform these actions; `wait` returns them when they have finished."""
        if claimed:
            self._loop.call_soon_threadsafe(self._begin, claimed)

    def wait(self, seconds: float) -> list[Finished]:
        """Return the attempts that have finished since the last call, as soon as there is one or `seconds` are over."""
        finished: list[Finished] = []
        with suppress(queue.Empty):
            finished.append(self._finished.get(timeout=seconds))
            while True:
                finished.append(self._finished.get(timeout=_GATHER_SECONDS))
        return finished

    def extend(self, ids: list[Any], lease_ends: float) -> None:
        """Let the handlers of these actions go on: their leases were extended until then, by times.elapsed_seconds."""
        self._loop.call_soon_threadsafe(self._handlers.extend, ids, lease_ends)

    def ask_to_stop(self, grace_seconds: float) -> None:
        """Ask the operator's handlers to end. One that has not ended so many seconds later is killed, and "retried".

        Unlike the other methods, this one may be called from any thread, and after the end.
        """
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._handlers.ask_to_stop, grace_seconds)

    def cancel(self, ids: list[Any]) -> None:
        """Stop these attempts; they finish as "cancelled"."""
        self._loop.call_soon_threadsafe(self._cancel, ids)

    def _begin(self, claimed: list[Claimed]) -> None:
        for each in claimed:
            task = self._loop.create_task(self._attempt(each))
            self._tasks[each.action.id] = task
            task.add_done_callback(partial(self._end, each))

    def _cancel(self, ids: list[Any]) -> None:
        for each in ids:
            if each in self._tasks:
                self._tasks[each].cancel()

    def _end(self, claimed: Claimed, task: "asyncio.Task[Finished]") -> None:
        del self._tasks[claimed.action.id]
        # A task that is cancelled before its first step returns no result.
        cancelled = Finished(claimed, "cancelled", "stopped before it ran")
        self._finished.put(cancelled if task.cancelled() else task.result())

    async def _attempt(self, claimed: Claimed) -> Finished:
        try:
            with logs.context(action=claimed.action.id, kind=claimed.action.kind):
                detail = await self._handlers.perform(claimed)
        except asyncio.CancelledError:
            return Finished(claimed, "cancelled", "stopped while it ran")
        except TimeoutError:
            reason = f"longer than the action_timeout of {self._handlers.timeout_seconds:g} s"
            return Finished(claimed, "retried", reason)
        except HopelessAction as error:
            return Finished(claimed, "failed", one_line(str(error)))
        except PostponedAction as error:
            return Finished(claimed, "retried", one_line(str(error)), error.after_seconds)
        except Exception as error:
            log.exception("action_handler_raised", action=claimed.action.id, kind=claimed.action.kind)
            return Finished(claimed, "retried", one_line(f"{type(error).__name__}: {error}"))
        return Finished(claimed, "done", detail)

    async def _close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._handlers.close()
