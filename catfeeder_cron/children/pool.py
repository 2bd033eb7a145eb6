"""Which process a call goes to: one that did the same before, as long as it has idled for less than a minute."""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, copy_context
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from catfeeder_cron.children.messages import Request, Returned
from catfeeder_cron.children.process import ChildProcess, NotBegun
from catfeeder_cron.errors import CatfeederCronError

STOP_GRACE = timedelta(seconds=10)
"""How long a callable has to end after it was asked to."""

_IDLE = timedelta(seconds=60)
_MOST_IDLE = 16


class Call:
    """A call under way. All methods may be called from any thread, and none waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: Request) -> None:
        self._loop = loop
        self._child: ChildProcess | None = None
        self._stop_requested = False
        self._seconds = 0.0
        self.request = request
        self.future: Future[Returned] = Future()
        """Gets what ChildProcess.result returns or raises; it surely does after `ask_to_stop` or `kill`."""
        self.future.set_running_or_notify_cancel()  # only a kill ends it early
        self.was_killed = False

    def ask_to_stop(self) -> None:
        """Ask it to stop, and kill it when it has not ended after STOP_GRACE."""
        self._soon(self._ask_to_stop)

    def set_deadline(self, seconds: float) -> None:
        """Have it killed after so many seconds even if this process is frozen or gone; 0 takes that back."""
        self._soon(self._set_deadline, seconds)

    def kill(self) -> None:
        """End it and all that it has started."""
        self._soon(self._kill)

    # What follows is called in the loop's thread alone.

    def enter(self, child: ChildProcess) -> None:
        """Send the call to this process, and all that was asked of it so far."""
        self._child = child
        child.send(self.request)
        if self._seconds:
            child.set_deadline(self._seconds)
        if self._stop_requested:
            child.ask_to_stop()
        if self.was_killed:
            child.kill()

    def leave(self) -> None:
        if self._child and self._seconds:
            self._child.set_deadline(0)
        self._child = None

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so every process has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _ask_to_stop(self) -> None:
        if not self._stop_requested and not self.future.done():
            self._stop_requested = True
            self._loop.call_later(STOP_GRACE.total_seconds(), self._kill)
            if self._child:
                self._child.ask_to_stop()

    def _set_deadline(self, seconds: float) -> None:
        self._seconds = seconds
        if self._child:
            self._child.set_deadline(seconds)

    def _kill(self) -> None:
        if not self.future.done():
            self.was_killed = True
            if self._child:
                self._child.kill()


class Children:
    """The processes for an operator's callables, from the first call to `close`. Costs nothing before.

    One that has had nothing to do for as long as `idle` is ended.
    All methods may be called from any thread. A pool that is dropped ends its processes. When this process ends,
    however that happens, they end too.
    """

    def __init__(self, idle: timedelta = _IDLE) -> None:
        self._idle = idle
        self._lock = threading.Lock()  # between threads that make the first call, or close meanwhile
        self._processes: _Processes | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(
        self,
        key: str,
        reference: str,
        *arguments: Any,
        on_line: Callable[[str], None],
        keywords: dict[str, Any] | None = None,
    ) -> Call:
        """Call "package.module:function" in a process that only serves calls of this `key`.

        The arguments must be picklable. What the callable prints goes to `on_line`, line by line; what it logs to the
        logger of the same name here; both with the log context that holds now. Raises CatfeederCronError once closed.
        """
        return self._begin(key, reference, (arguments, keywords or {}), on_line)

    def find(self, key: str, reference: str, *, on_line: Callable[[str], None]) -> Call:
        """Only import "package.module:function"."""
        return self._begin(key, reference, None, on_line)

    def retire(self) -> None:
        """Let no process take a further call: the next ones import the operator's code anew."""
        with self._lock:
            if self._processes:
                self._processes.soon(self._processes.retire)

    def close(self) -> None:
        """End all processes; calls under way are killed. Idempotent."""
        with self._lock:
            self._closed = True
            processes, self._processes = self._processes, None
        if processes:
            processes.close()

    def _begin(
        self,
        key: str,
        reference: str,
        arguments: tuple[tuple[Any, ...], dict[str, Any]] | None,
        on_line: Callable[[str], None],
    ) -> Call:
        context = copy_context()  # entered by the loop's thread alone, so never twice at once
        request = Request(
            reference,
            arguments,
            on_line=lambda line: context.run(on_line, line),
            on_record=lambda record: context.run(_log, record),
        )
        with self._lock:
            if self._closed:
                raise CatfeederCronError("it can't be called any more: this program is ending")
            if self._processes is None:
                self._processes = _Processes(self._idle)
                weakref.finalize(self, self._processes.end_soon)
            return self._processes.begin(key, request)


def _log(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


class _Processes:
    """What happens in the thread of the event loop. It outlives every process: the kernel tells a process of its
    parent's end when the thread that forked it has ended.
    """

    def __init__(self, idle: timedelta) -> None:
        self._idle_seconds = idle.total_seconds()
        self._loop = asyncio.new_event_loop()
        self._idle: dict[ChildProcess, tuple[str, asyncio.TimerHandle]] = {}  # the longest idle first
        self._retired_at = 0
        self._tasks: dict[asyncio.Task[None], Call] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._work, name="children", daemon=True)
        self._thread.start()

    def begin(self, key: str, request: Request) -> Call:
        call = Call(self._loop, request)
        # In an empty context: this thread's log context is for the call alone, not for the process that it starts.
        self._loop.call_soon_threadsafe(self._begin, key, call, context=Context())
        return call

    def soon(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.end_soon()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def end_soon(self) -> None:
        """Begin to end, without waiting: called by the garbage collector, too."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._loop.stop)

    def retire(self) -> None:
        self._retired_at += 1
        for child in list(self._idle):
            self._end(child)

    def _work(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end_all())
        finally:
            self._loop.close()

    def _begin(self, key: str, call: Call) -> None:
        task = self._loop.create_task(self._perform(key, call))
        self._tasks[task] = call
        task.add_done_callback(self._tasks.pop)

    async def _perform(self, key: str, call: Call) -> None:
        try:
            returned = await self._result(key, call)
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits for the call must hear of it
            call.future.set_exception(error)
        else:
            call.future.set_result(returned)

    async def _result(self, key: str, call: Call) -> Returned:
        """Make the call; once more where the process that was there had died in the meantime."""
        child = self._take_idle(key)
        if child is not None:
            with suppress(NotBegun):
                return await self._result_of(child, key, call)
        return await self._result_of(await ChildProcess.start(), key, call)

    async def _result_of(self, child: ChildProcess, key: str, call: Call) -> Returned:
        as_of = self._retired_at
        call.enter(child)
        try:
            return await child.result()
        finally:
            call.leave()
            if child.alive and not call.was_killed and as_of == self._retired_at:
                self._keep(child, key)
            else:
                self._end(child)

    def _take_idle(self, key: str) -> ChildProcess | None:
        for child, (done_before, timer) in reversed(self._idle.items()):
            if done_before == key:
                timer.cancel()
                del self._idle[child]
                return child
        return None

    def _keep(self, child: ChildProcess, key: str) -> None:
        self._idle[child] = key, self._loop.call_later(self._idle_seconds, self._end, child)
        if len(self._idle) > _MOST_IDLE:
            self._end(next(iter(self._idle)))

    def _end(self, child: ChildProcess) -> None:
        if child in self._idle:
            self._idle.pop(child)[1].cancel()
        task = self._loop.create_task(child.end())
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end_all(self) -> None:
        for call in list(self._tasks.values()):
            call.kill()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for child in list(self._idle):
            self._end(child)
        if self._endings:
            await asyncio.wait(self._endings)
