"""Sends each call to a process that served the same key before, if one has idled for less than a minute."""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, copy_context
from datetime import timedelta
from typing import Any, Self

from catfeeder_cron.children.messages import Request, Returned
from catfeeder_cron.children.process import ChildProcess, DiedAtDeadline, NotBegun
from catfeeder_cron.errors import GRACE_SECONDS, CatfeederCronError
from catfeeder_cron.times import elapsed_seconds

_IDLE = timedelta(seconds=60)
_MOST_IDLE = 16
_NEVER = float("inf")


class Call:
    """A call under way. All methods may be called from any thread, and none waits.

    The attributes belong to the loop's thread: the methods for other threads only pass their request on to it, so no
    lock is needed. `future` is safe in any thread, and `was_killed` may be read anywhere once `future` is done.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, request: Request, deadline: float) -> None:
        self._loop = loop
        self._child: ChildProcess | None = None
        self._stop_requested = False
        self._killing: asyncio.TimerHandle | None = None
        self._deadline = deadline
        self.request = request
        self.future: Future[Returned] = Future()
        """Gets the result or error of ChildProcess.result; after `ask_to_stop` or `kill` it surely gets one."""
        self.future.set_running_or_notify_cancel()  # only a kill ends it early
        self.was_killed = False

    def ask_to_stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Ask the callable to stop, and kill it when it has not ended after so many seconds.

        A second call can only make that earlier.
        """
        self._soon(self._ask_to_stop, grace_seconds)

    def set_deadline(self, at: float) -> None:
        """Have the guard kill it at this time of times.elapsed_seconds, even if this process is frozen or gone by then.

        A call that has not begun by then is not made. Infinity takes the deadline back.
        """
        self._soon(self._set_deadline, at)

    def kill(self) -> None:
        """Kill the callable and everything that it has started."""
        self._soon(self._kill)

    # The methods below are called in the loop's thread alone.

    def enter(self, child: ChildProcess) -> None:
        """Send the call to this process, with the stop, the deadline or the kill that was requested before.

        Raises DiedAtDeadline when the deadline has passed.
        """
        self._child = child
        if self._deadline < _NEVER:
            # First, so that the callable is never at work without it, even if this process is frozen in between.
            child.set_deadline(self._deadline)
            if elapsed_seconds() >= self._deadline:
                raise DiedAtDeadline("its deadline was over before it began")
        child.send(self.request)
        if self._stop_requested:
            child.ask_to_stop()
        if self.was_killed:
            child.kill()

    def leave(self) -> None:
        """Forget the process, and take the deadline back: the process may serve another call next."""
        if self._child and self._deadline < _NEVER:
            self._child.set_deadline(_NEVER)
        self._child = None

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so every process has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _ask_to_stop(self, grace_seconds: float) -> None:
        if self.future.done():
            return
        if self._killing is None or self._loop.time() + grace_seconds < self._killing.when():
            if self._killing is not None:
                self._killing.cancel()
            self._killing = self._loop.call_later(grace_seconds, self._kill)
        if not self._stop_requested:
            self._stop_requested = True
            if self._child:
                self._child.ask_to_stop()

    def _set_deadline(self, at: float) -> None:
        self._deadline = at
        if self._child:
            self._child.set_deadline(at)

    def _kill(self) -> None:
        if not self.future.done():
            self.was_killed = True
            if self._child:
                self._child.kill()


class Children:
    """Run the operator's callables in processes, which are started by the first calls and ended by `close`.

    A process that has idled for as long as `idle` is ended. All methods may be called from any thread. A pool that is
    dropped ends its processes. When this process ends, however that happens, they end too.
    """

    def __init__(self, idle: timedelta = _IDLE) -> None:
        self._idle = idle
        # Held by a thread that makes a call, retires or closes: of two first calls, one starts the loop's thread, and
        # none reaches a loop that another thread closes meanwhile. Nothing waits for a process while it is held.
        self._lock = threading.Lock()
        self._processes: _Processes | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def call(
        self,
        key: str,
        reference: str,
        *arguments: Any,
        on_line: Callable[[str], None],
        keywords: dict[str, Any] | None = None,
        deadline: float = _NEVER,
    ) -> Call:
        """Call "package.module:function" in a process that only serves calls of this `key`.

        The arguments must be picklable. `on_line` gets each line that the callable prints, and the logger of the same
        name in this process gets each record that it logs; both see the log context of the moment of this call.
        `deadline` is that of Call.set_deadline. Raises CatfeederCronError once closed.
        """
        return self._begin(key, reference, (arguments, keywords or {}), on_line, deadline)

    def find(self, key: str, reference: str, *, on_line: Callable[[str], None]) -> Call:
        """Import "package.module:function" in such a process, without calling it. Raises as `call` does."""
        return self._begin(key, reference, None, on_line)

    def retire(self) -> None:
        """Let no present process take a further call: later calls import the operator's code anew, in new processes."""
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
        deadline: float = _NEVER,
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
                # Not at exit: runs are asked to end then (see lifecycle), and the processes end with this one.
                weakref.finalize(self, self._processes.end_soon).atexit = False
            return self._processes.begin(key, request, deadline)


def _log(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


class _Processes:
    """The thread of the event loop, and all processes. `begin`, `soon`, `close` and `end_soon` are for other threads.

    The thread outlives every process: the kernel tells a process of its parent's end when the thread that forked it has
    ended. All attributes but `_loop` and `_thread` belong to this thread, so no lock is needed.
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

    def begin(self, key: str, request: Request, deadline: float) -> Call:
        """Begin a call, and return at once."""
        call = Call(self._loop, request, deadline)
        # In an empty context: this thread's log context is for the call alone, not for the process that it starts.
        self._loop.call_soon_threadsafe(self._begin, key, call, context=Context())
        return call

    def soon(self, function: Callable[[], None]) -> None:
        """Have the loop's thread call the function."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Kill the calls under way, end every process, and wait for that, except in the loop's own thread."""
        self.end_soon()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def end_soon(self) -> None:
        """Begin to end, without waiting: the garbage collector calls this too, in any thread."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._loop.stop)

    def retire(self) -> None:
        """End the idle processes now, and the others after their call. Called in the loop's thread."""
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
        except BaseException as error:  # noqa: BLE001 - the thread that waits for the call must get any error
            call.future.set_exception(error)
        else:
            call.future.set_result(returned)

    async def _result(self, key: str, call: Call) -> Returned:
        """Make the call in an idle process, or in a new one if there is none, or if it died before the call began."""
        child = self._take_idle(key)
        if child is not None:
            with suppress(NotBegun):
                return await self._result_of(child, key, call)
        return await self._result_of(await ChildProcess.start(), key, call)

    async def _result_of(self, child: ChildProcess, key: str, call: Call) -> Returned:
        as_of = self._retired_at
        try:
            call.enter(child)
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
