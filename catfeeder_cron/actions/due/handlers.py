"""Find the handler of an action's kind and call it: a built-in one in this process, the operator's in a child."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Literal

from catfeeder_cron.actions.action import Handler, Perform
from catfeeder_cron.actions.due.fence import NOT_EXTENDED, Fence
from catfeeder_cron.actions.due.leases import Claimed
from catfeeder_cron.children.pool import Call, Children
from catfeeder_cron.config import ActionsSettings
from catfeeder_cron.errors import (
    GRACE_SECONDS,
    CallableRaised,
    CatfeederCronError,
    ChildDied,
    ConfigurationError,
    HopelessAction,
    PostponedAction,
)
from catfeeder_cron.logs import get_logger
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.actions")
log_of_output = get_logger("catfeeder_cron.output")

# How often a clock is compared: no timer runs while a machine is suspended.
_LOOK_SECONDS = 1.0

_Over = Literal["time", "lease"]
"""What was over before a handler had ended: its own time, or its lease."""


class Handlers:
    """The handlers of one run. All methods belong to the thread of the run's event loop, so there is no lock."""

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
        self.timeout_seconds = timeout_seconds
        self._lease_seconds = lease_seconds
        self._fences: dict[Any, Fence] = {}
        """Those of the attempts under way, by the id of their action."""
        self._calls: dict[Any, Call] = {}
        """The operator's handlers at work, by the id of their action."""
        self._performs: dict[str, Perform] = {}
        self._opened = AsyncExitStack()

    def extend(self, ids: list[Any], lease_ends: float) -> None:
        """Let these actions go on: their leases were extended until then, by times.elapsed_seconds."""
        for each in ids:
            if each in self._fences:
                self._fences[each].extend(lease_ends)
            if each in self._calls:
                self._calls[each].set_deadline(self._fences[each].kill_at)

    def ask_to_stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Ask the operator's handlers at work to end; a child that has not ended so many seconds later is killed."""
        for call in self._calls.values():
            call.ask_to_stop(grace_seconds)

    async def close(self) -> None:
        """Close the built-in handlers that were opened."""
        await self._opened.aclose()

    async def perform(self, claimed: Claimed) -> str | None:
        """Perform an action and return its handler's text. The handler has ended before the lease does.

        Raises TimeoutError after its time, HopelessAction, PostponedAction, or any exception of a built-in handler.
        """
        fence = Fence(self._lease_seconds, claimed.lease_ends)
        fence.require_time()
        self._fences[claimed.action.id] = fence
        try:
            return await self._perform(claimed, fence)
        finally:
            del self._fences[claimed.action.id]

    async def _perform(self, claimed: Claimed, fence: Fence) -> str | None:
        if claimed.unreadable is not None:
            raise HopelessAction(claimed.unreadable)
        kind = claimed.action.kind
        reference = self._settings.handlers.get(kind)
        if reference is not None:
            return await self._perform_in_child(claimed, reference, fence)
        if kind not in self._built_in:
            known = ", ".join(sorted({*self._built_in, *self._settings.handlers}))
            raise HopelessAction(f'no handler for the kind "{kind}"; there are {known}')
        async with asyncio.timeout(self.timeout_seconds):
            if kind not in self._performs:
                opened = self._built_in[kind].open(self._settings)
                self._performs[kind] = await self._opened.enter_async_context(opened)
            return await fence.perform(partial(self._performs[kind], claimed.action))

    async def _perform_in_child(self, claimed: Claimed, reference: str, fence: Fence) -> str | None:
        """Call the operator's handler in a process of its own, which does not outlive the lease.

        Raises TimeoutError when its time was over before it had done its work.
        """
        action = claimed.action
        key, deadline = f"actions.{action.kind}", fence.kill_at
        call = self._children.call(key, reference, action, deadline=deadline, on_line=_log_line)
        self._calls[action.id] = call
        try:
            over = await self._wait(call, fence)
        finally:
            del self._calls[action.id]
        try:
            returned = call.future.result()
        except CallableRaised as error:
            log.warning("action_raised", reason=str(error), exception=error.traceback)
            raise PostponedAction(str(error)) from None
        except (ChildDied, ConfigurationError) as error:
            if over == "time" and call.was_killed:
                raise TimeoutError from None
            stopped = f"{_asked(over)}, did not end, and was killed"
            raise PostponedAction(stopped if call.was_killed else str(error)) from None
        except (HopelessAction, PostponedAction):
            raise
        except CatfeederCronError as error:  # such as an exit status that is not 0
            log.warning("action_raised", reason=str(error))
            raise PostponedAction(str(error)) from None
        if returned.stop_was_seen:
            raise TimeoutError if over == "time" else PostponedAction(_asked(over))
        return returned.text

    async def _wait(self, call: Call, fence: Fence) -> _Over | None:
        """Wait until a call has ended; return what was over first, so that it was asked to stop."""
        waiting = asyncio.wrap_future(call.future)
        time_ends, over = elapsed_seconds() + self.timeout_seconds, None
        try:
            while over is None and not waiting.done():
                left = min(time_ends, fence.stop_at) - elapsed_seconds()
                if left > 0:
                    await asyncio.wait([waiting], timeout=min(left, _LOOK_SECONDS))
                else:
                    over = self._ask(call, fence, time_ends)
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            # Another daemon may begin the action after this, so wait until the handler is dead.
            call.kill()
            await asyncio.wait([waiting])
            raise
        finally:
            if waiting.done():
                waiting.exception()  # marks it as read; the caller reads the result from the call's own future
        return over

    def _ask(self, call: Call, fence: Fence, time_ends: float) -> _Over:
        if time_ends <= fence.stop_at:
            call.ask_to_stop()
            return "time"
        # From here on its guard kills it at the fence, unless the lease is extended after all.
        log.warning("action_lease_not_extended", stops_within_seconds=round(fence.grace_seconds, 1))
        call.ask_to_stop(fence.grace_seconds)
        return "lease"


def _asked(over: _Over | None) -> str:
    """Say why a handler was asked to stop."""
    return f"{NOT_EXTENDED}: it was asked to stop" if over == "lease" else "it was asked to stop"


def _log_line(line: str) -> None:
    log_of_output.info("action_output", line=line)
