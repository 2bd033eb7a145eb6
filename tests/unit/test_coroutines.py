"""A coroutine runs to its end from code that is not asynchronous, whether or not an event loop runs in its thread."""

import asyncio
import signal
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from catfeeder_cron.coroutines import run_coroutine

Call = Callable[[Callable[[], Any]], Any]

portions: ContextVar[int] = ContextVar("portions")


def without_a_loop(function: Callable[[], Any]) -> Any:
    return function()


def inside_a_loop(function: Callable[[], Any]) -> Any:
    """Call it in a thread that runs an event loop. A loop of `asyncio.run` would take the first SIGINT for itself."""

    async def main() -> Any:
        return function()

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


anywhere = pytest.mark.parametrize("call", [without_a_loop, inside_a_loop])


@anywhere
def test_it_returns_what_the_coroutine_returns_and_sees_the_callers_context(call: Call) -> None:
    async def serve() -> int:
        await asyncio.sleep(0)
        return portions.get()

    token = portions.set(3)
    try:
        assert call(lambda: run_coroutine(serve())) == 3
    finally:
        portions.reset(token)


@anywhere
@pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_it_raises_what_the_coroutine_raises(call: Call, error: type[BaseException]) -> None:
    async def spill() -> None:
        raise error

    with pytest.raises(error):
        call(lambda: run_coroutine(spill()))


@anywhere
def test_an_interrupt_of_the_wait_is_raised_when_the_coroutine_has_been_cancelled_and_has_cleaned_up(
    call: Call,
) -> None:
    told: list[str] = []

    async def serve() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            told.append("cleaned up")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            call(lambda: run_coroutine(serve()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["cleaned up"]


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    inside_a_loop(lambda: run_coroutine(asyncio.sleep(0)))
    assert set(threading.enumerate()) <= before
