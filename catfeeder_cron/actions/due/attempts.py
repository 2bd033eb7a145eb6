"""Handlers at work: in an event loop with a thread of its own, so that waiting for one holds up no other."""

import asyncio
import queue
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from catfeeder_cron import logs
from catfeeder_cron.actions.action import Handler, Perform
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.children.pool import Call, Children
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.errors import CallableRaised, ChildDied, ConfigurationError, HopelessAction, PostponedAction
from catfeeder_cron.logs import get_logger, one_line

log = get_logger("catfeeder_cron.actions")
log_of_output = get_logger("catfeeder_cron.output")

# Outcomes that come this close together are stored together.
_GATHER_SECONDS = 0.001

Verdict = Literal["done", "retried", "failed", "cancelled"]


@dataclass(frozen=True)
class Finished:
    """How an attempt ended. "retried" becomes "failed" where it was the last one."""

    claimed: Claimed
    verdict: Verdict
    detail: str | None = None
    after_seconds: float = 0


class Attempts:
    """Performs actions from `__enter__` to `__exit__`, which cancels what is still under way."""

    def __init__(
        self,
        settings: ActionsSettings,
        built_in: Mapping[str, Handler],
        children: Children,
        timeout_seconds: float,
        lease_seconds: float,
    ) -> None:
        self._settings = settings
        self._built_in = built_in
        self._children = children
        self._timeout_seconds = timeout_seconds
        self._lease_seconds = lease_seconds
        self._finished: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._tasks: dict[Any, asyncio.Task[Finished]] = {}
        self._at_work: dict[Any, Call] = {}
        self._performs: dict[str, Perform] = {}
        self._opened = AsyncExitStack()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="actions", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def begin(self, claimed: list[Claimed]) -> None:
        """Have these actions performed; `wait` tells when they are."""
        if claimed:
            self._loop.call_soon_threadsafe(self._begin, claimed)

    def wait(self, seconds: float) -> list[Finished]:
        """Return what has finished since the last call, as soon as there is any, and no later than after `seconds`."""
        finished: list[Finished] = []
        with suppress(queue.Empty):
            finished.append(self._finished.get(timeout=seconds))
            while True:
                finished.append(self._finished.get(timeout=_GATHER_SECONDS))
        return finished

    def extend(self, ids: list[Any]) -> None:
        """Let these go on: their leases were extended."""
        self._loop.call_soon_threadsafe(self._extend, ids)

    def ask_to_stop(self) -> None:
        """Ask the operator's handlers to end: what has not ended ten seconds later is killed, and "retried"."""
        self._loop.call_soon_threadsafe(self._ask_to_stop)

    def cancel(self, ids: list[Any]) -> None:
        """Stop these attempts; they finish as "cancelled"."""
        self._loop.call_soon_threadsafe(self._cancel, ids)

    def _begin(self, claimed: list[Claimed]) -> None:
        for each in claimed:
            task = self._loop.create_task(self._verdict(each))
            self._tasks[each.action.id] = task
            task.add_done_callback(partial(self._end, each))

    def _extend(self, ids: list[Any]) -> None:
        for each in ids:
            if each in self._at_work:
                self._at_work[each].set_deadline(self._lease_seconds)

    def _ask_to_stop(self) -> None:
        for call in self._at_work.values():
            call.ask_to_stop()

    def _cancel(self, ids: list[Any]) -> None:
        for each in ids:
            if each in self._tasks:
                self._tasks[each].cancel()

    def _end(self, claimed: Claimed, task: "asyncio.Task[Finished]") -> None:
        del self._tasks[claimed.action.id]
        # A task that is cancelled before its first step never comes to a verdict of its own.
        cancelled = Finished(claimed, "cancelled", "stopped before it ran")
        self._finished.put(cancelled if task.cancelled() else task.result())

    async def _verdict(self, claimed: Claimed) -> Finished:
        try:
            with logs.context(action=claimed.action.id, kind=claimed.action.kind):
                detail = await self._perform(claimed)
        except asyncio.CancelledError:
            return Finished(claimed, "cancelled", "stopped while it ran")
        except TimeoutError:
            reason = f"longer than the action_timeout of {self._timeout_seconds:g} s"
            return Finished(claimed, "retried", reason)
        except HopelessAction as error:
            return Finished(claimed, "failed", one_line(str(error)))
        except PostponedAction as error:
            return Finished(claimed, "retried", one_line(str(error)), error.after_seconds)
        except Exception as error:
            log.exception("action_handler_raised", action=claimed.action.id, kind=claimed.action.kind)
            return Finished(claimed, "retried", one_line(f"{type(error).__name__}: {error}"))
        return Finished(claimed, "done", detail)

    async def _perform(self, claimed: Claimed) -> str | None:
        if claimed.unreadable is not None:
            raise HopelessAction(claimed.unreadable)
        kind = claimed.action.kind
        reference = self._settings.handlers.get(kind)
        if reference is not None:
            return await self._perform_in_child(claimed, reference)
        if kind not in self._built_in:
            known = ", ".join(sorted({*self._built_in, *self._settings.handlers}))
            raise HopelessAction(f'no handler for the kind "{kind}"; there are {known}')
        async with asyncio.timeout(self._timeout_seconds):
            if kind not in self._performs:
                opened = self._built_in[kind].open(self._settings)
                self._performs[kind] = await self._opened.enter_async_context(opened)
            return await self._performs[kind](claimed.action)

    async def _perform_in_child(self, claimed: Claimed, reference: str) -> str | None:
        """Call the operator's handler in a process of its own, which does not outlive the lease.

        Raises TimeoutError when its time was over before it had done its work.
        """
        action = claimed.action
        call = self._children.call(f"actions.{action.kind}", reference, action, on_line=_log_line)
        call.set_deadline(self._lease_seconds)
        self._at_work[action.id] = call
        try:
            timed_out = await self._wait(call)
        finally:
            del self._at_work[action.id]
        try:
            returned = call.future.result()
        except CallableRaised as error:
            log.warning("action_raised", reason=str(error), exception=error.traceback)
            raise PostponedAction(str(error)) from None
        except (ChildDied, ConfigurationError) as error:
            if timed_out and call.was_killed:
                raise TimeoutError from None
            stopped = "it did not end when it was asked to stop, and was killed"
            raise PostponedAction(stopped if call.was_killed else str(error)) from None
        if returned.stop_was_seen:
            raise TimeoutError if timed_out else PostponedAction("it was asked to stop")
        return returned.text

    async def _wait(self, call: Call) -> bool:
        """Wait until a call has ended; return whether it had to be asked to stop because its time was up."""
        waiting = asyncio.wrap_future(call.future)
        try:
            await asyncio.wait([waiting], timeout=self._timeout_seconds)
            if timed_out := not waiting.done():
                call.ask_to_stop()
                await asyncio.wait([waiting])
        except asyncio.CancelledError:
            # Nobody else may begin the action while its handler is still at work.
            call.kill()
            await asyncio.wait([waiting])
            raise
        finally:
            if waiting.done():
                waiting.exception()  # it is the call's own future that is asked
        return timed_out

    async def _close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._opened.aclose()


def _log_line(line: str) -> None:
    log_of_output.info("action_output", line=line)
