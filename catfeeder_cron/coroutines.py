"""Runs a coroutine from code that is not asynchronous, in any thread.

`asyncio.run` refuses to work in a thread that runs an event loop: in an async web handler, in a notebook. Our methods
work there too, so in such a thread the coroutine gets another thread with an event loop of its own.
"""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from contextvars import copy_context
from threading import Thread
from typing import Any, TypeVar

# How long a thread may take to begin on a busy machine.
_BEGIN_SECONDS = 10

# A signal that comes just before a thread begins to wait for a lock does not end the wait; its handler runs at the next
# chance, which comes this often.
_LOOK_SECONDS = 1

T = TypeVar("T")


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine to its end, and return its result or raise its error; this thread waits meanwhile.

    The coroutine sees the context variables of this thread. When a KeyboardInterrupt ends the wait, the coroutine is
    cancelled, and the interrupt is raised when it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    return _run_in_thread(coroutine)


def _run_in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    # Both futures cross threads: the new thread sets them, this one waits for them.
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()
    ended: Future[T] = Future()

    async def work() -> T:
        task = asyncio.create_task(coroutine)
        begun.set_result((asyncio.get_running_loop(), task))
        return await task

    def run() -> None:
        try:
            ended.set_result(asyncio.run(work()))
        except BaseException as error:  # noqa: BLE001 - `ended.result()` raises it in the thread that waits
            ended.set_exception(error)

    thread = Thread(target=copy_context().run, args=[run], name="coroutine")
    try:
        thread.start()
        while not ended.done():
            wait([ended], timeout=_LOOK_SECONDS)
    except BaseException as error:
        if isinstance(error, RuntimeError) and thread.ident is None:
            coroutine.close()  # the system has no further thread
            raise
        # A signal handler raised it in this thread, so the coroutine in the other thread is cancelled, if it has begun.
        either: list[Future[Any]] = [begun, ended]
        wait(either, timeout=_BEGIN_SECONDS, return_when=FIRST_COMPLETED)
        if begun.done():
            loop, task = begun.result()
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
            wait([ended])
        raise
    thread.join()
    return ended.result()
