"""Find the handler of an action's kind and call it: a built-in one in this process, the operator's in a child."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from catfeeder_cron.actions.action import Handler, Perform
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.children.pool import Call, Children
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.errors import (
    CallableRaised,
    CatfeederCronError,
    ChildDied,
    ConfigurationError,
    HopelessAction,
    PostponedAction,
)
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.actions")
log_of_output = get_logger("catfeeder_cron.output")


class Handlers:
    """The handlers of one run. All methods belong to the thread of the run's event loop, so there is no lock."""

    def __init__(
        self,
        settings: ActionsSettings,
        built_in: Mapping[str, Handler],
        children: Children,
        timeout_seconds: float,
    ) -> None:
        self._settings = settings
        self._built_in = built_in
        self._children = children
        self.timeout_seconds = timeout_seconds
        self._calls: dict[Any, Call] = {}
        """The operator's handlers at work, by the id of their action."""
        self._performs: dict[str, Perform] = {}
        self._opened = AsyncExitStack()

    def extend(self, ids: list[Any], lease_ends: float) -> None:
        """Let these actions go on: their leases were extended until then, by times.elapsed_seconds."""
        for each in ids:
            if each in self._calls:
                self._calls[each].set_deadline(lease_ends)

    def ask_to_stop(self) -> None:
        """Ask the operator's handlers at work to end; a child that has not ended ten seconds later is killed."""
        for call in self._calls.values():
            call.ask_to_stop()

    async def close(self) -> None:
        """Close the built-in handlers that were opened."""
        await self._opened.aclose()

    async def perform(self, claimed: Claimed) -> str | None:
        """Perform an action and return its handler's text.

        Raises TimeoutError after its time, HopelessAction, PostponedAction, or any exception of a built-in handler.
        """
        if claimed.unreadable is not None:
            raise HopelessAction(claimed.unreadable)
        kind = claimed.action.kind
        reference = self._settings.handlers.get(kind)
        if reference is not None:
            return await self._perform_in_child(claimed, reference)
        if kind not in self._built_in:
            known = ", ".join(sorted({*self._built_in, *self._settings.handlers}))
            raise HopelessAction(f'no handler for the kind "{kind}"; there are {known}')
        async with asyncio.timeout(self.timeout_seconds):
            if kind not in self._performs:
                opened = self._built_in[kind].open(self._settings)
                self._performs[kind] = await self._opened.enter_async_context(opened)
            return await self._performs[kind](claimed.action)

    async def _perform_in_child(self, claimed: Claimed, reference: str) -> str | None:
        """Call the operator's handler in a process of its own, which does not outlive the lease.

        Raises TimeoutError when its time was over before it had done its work.
        """
        action = claimed.action
        key, deadline = f"actions.{action.kind}", claimed.lease_ends
        call = self._children.call(key, reference, action, deadline=deadline, on_line=_log_line)
        self._calls[action.id] = call
        try:
            timed_out = await self._wait(call)
        finally:
            del self._calls[action.id]
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
        except (HopelessAction, PostponedAction):
            raise
        except CatfeederCronError as error:  # such as an exit status that is not 0
            log.warning("action_raised", reason=str(error))
            raise PostponedAction(str(error)) from None
        if returned.stop_was_seen:
            raise TimeoutError if timed_out else PostponedAction("it was asked to stop")
        return returned.text

    async def _wait(self, call: Call) -> bool:
        """Wait until a call has ended; return whether its time was over first, so that it was asked to stop."""
        waiting = asyncio.wrap_future(call.future)
        try:
            await asyncio.wait([waiting], timeout=self.timeout_seconds)
            if timed_out := not waiting.done():
                call.ask_to_stop()
                await asyncio.wait([waiting])
        except asyncio.CancelledError:
            # Another daemon may begin the action after this, so wait until the handler is dead.
            call.kill()
            await asyncio.wait([waiting])
            raise
        finally:
            if waiting.done():
                waiting.exception()  # marks it as read; the caller reads the result from the call's own future
        return timed_out


def _log_line(line: str) -> None:
    log_of_output.info("action_output", line=line)
