"""Calls an operator's functions, one at a time, in a process that does nothing else.

A function may change anything here: replace the standard streams, configure logging, leave threads behind, fork.
Before each call the worker restores the streams and the logging that the call relies on.
"""

import faulthandler
import json
import logging
import os
import pickle
import sys
import threading
from base64 import b64decode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import SimpleQueue
from types import AsyncGeneratorType, GeneratorType
from typing import Any, NoReturn, TextIO

from catfeeder_cron.children.callables import find_callable
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError, HopelessAction, JobSkipped, PostponedAction
from catfeeder_cron.run_control import CallableRun, enter_callable_run

_LONGEST_TEXT = 8000
_LONGEST_RECORD = 100_000
# How long a coroutine may take to clean up before it is cancelled once more.
_CLEAN_UP_SECONDS = 3


def main() -> NoReturn:
    """Answer every call that comes in on standard input, until the daemon closes it."""
    channel = _Channel(os.dup(1), os.dup(2))
    os.dup2(2, 1)  # lines that the callable or its processes print are no answers
    calls = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a callable that reads its standard input must not take our lines
    os.close(null)
    faulthandler.enable(os.dup(2), all_threads=False)  # a crash tells where it was in the callable
    _Worker(channel, calls).work()


class _Channel:
    """Sends messages to the daemon: lines of JSON, and marks among the printed lines."""

    def __init__(self, answers: int, output: int) -> None:
        self._answers = answers
        self._output = output
        self._process = os.getpid()
        # `send` holds this handler's lock while it writes, so that lines don't mix: the callable's threads log while
        # the main thread answers. `logging` makes its handlers' locks anew after a fork, unlike a lock of our own.
        self.handler = _RecordHandler(self)

    def send(self, message: dict[str, object]) -> None:
        """Send a line. Raises OSError when the callable has closed our descriptors."""
        line = json.dumps(message).encode() + b"\n"
        self.handler.acquire()
        try:
            while line:
                line = line[os.write(self._answers, line) :]
        finally:
            self.handler.release()

    def mark(self, mark: str) -> None:
        """Write a line among the printed ones, so that the daemon knows that it has read all lines before it."""
        with suppress(OSError):
            os.write(self._output, f"\n{mark}\n".encode())

    @property
    def is_ours(self) -> bool:
        """Tell whether this is the worker; False in a process that the callable has forked, which must not answer."""
        return os.getpid() == self._process


class _RecordHandler(logging.Handler):
    """Sends log records to the daemon, which writes them to its log."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record; in a process that the callable has forked, print it."""
        try:
            trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else record.exc_text
            text = record.getMessage()
            if self._channel.is_ours:
                fields = {"name": record.name, "level": record.levelno, "created": record.created}
                texts = {"text": text[:_LONGEST_RECORD], "traceback": trace and trace[-_LONGEST_RECORD:]}
                self._channel.send({"log": fields | texts})
            else:
                print(text if trace is None else f"{text}\n{trace}", file=sys.__stderr__)
        except Exception:  # noqa: BLE001 - logging raises nothing into the code that logs
            self.handleError(record)


class _Worker:
    """Two threads: "calls" reads standard input and passes calls on by a queue; the main thread performs them.

    "calls" also sets the current `_run`, before it puts the call into the queue, and requests its stop.
    """

    def __init__(self, channel: _Channel, calls: int) -> None:
        self._channel = channel
        self._functions: dict[str, Callable[..., Any]] = {}
        self._waiting: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._run = CallableRun()
        threading.Thread(target=self._listen, args=[calls], name="calls", daemon=True).start()

    def work(self) -> NoReturn:
        """Perform and answer calls until standard input is closed, then end the process."""
        while (message := self._waiting.get()) is not None:
            self._prepare(message)
            self._channel.send({"begun": message["mark"]})
            verdict = self._perform(message)
            if not self._channel.is_ours:
                os._exit(0)  # this process was forked by the callable, and returned from it
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # closed, or replaced by anything
                    stream.flush()
            self._channel.mark(message["mark"])
            try:
                self._channel.send({"verdict": verdict, "stop_was_seen": self._run.stop_was_seen})
            except OSError:
                os._exit(1)  # it has closed our descriptors
        # Not os._exit: functions that the callables have registered with atexit are to be called.
        sys.exit(0)

    def _listen(self, calls: int) -> None:
        """Take in calls, and requests to stop the current one. Runs in a thread of its own."""
        with open(calls, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "end" in message:
                    break
                if "stop" in message:
                    self._run.request_stop()
                else:
                    # From here on a stop is meant for this call: they come one after the other.
                    self._run = CallableRun()
                    self._waiting.put(message)
        self._waiting.put(None)  # the daemon needs this process no more

    def _prepare(self, message: dict[str, Any]) -> None:
        """Restore the streams and the logging, which the call before may have changed."""
        enter_callable_run(self._run)
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name)
            with suppress(Exception):  # it may be closed, detached, or anything else
                if not stream.closed:
                    if hasattr(stream, "reconfigure"):
                        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
                    continue
            setattr(sys, name, _text_stream(number))
        root = logging.getLogger()
        root.setLevel(message["log_level"])
        if self._channel.handler not in root.handlers:
            root.addHandler(self._channel.handler)

    def _perform(self, message: dict[str, Any]) -> dict[str, Any]:
        reference = message["reference"]
        try:
            if reference not in self._functions:
                self._functions[reference] = find_callable(reference)
            if "arguments" not in message:
                return {"kind": "returned", "text": None}
            args, kwargs = pickle.loads(b64decode(message["arguments"]))  # noqa: S301 - the daemon's own
            result = self._functions[reference](*args, **kwargs)
            if isinstance(result, GeneratorType | AsyncGeneratorType):
                text = "it is a generator function, so calling it does nothing; expected no `yield` in it"
                return _told("hopeless", text)
            if isinstance(result, Awaitable):
                result = self._await(result)
        except BaseException as error:  # noqa: BLE001 - whatever it raises is an outcome
            return self._failure(error)
        return {"kind": "returned", "text": result[:_LONGEST_TEXT] if isinstance(result, str) else None}

    def _await(self, result: Any) -> Any:
        import asyncio

        run = self._run

        async def wait() -> Any:
            loop, task = asyncio.get_running_loop(), asyncio.ensure_future(result)

            def cancel() -> None:
                if not task.done():
                    run.stop_was_seen = True
                    task.cancel()
                    loop.call_later(_CLEAN_UP_SECONDS, cancel)  # again, if it ignores the first

            # The thread "calls" calls this when the stop comes; the task belongs to the loop's thread.
            with run.on_stop(lambda: loop.call_soon_threadsafe(cancel)):
                return await task

        return asyncio.run(wait())

    def _failure(self, error: BaseException) -> dict[str, Any]:
        match error:
            case SystemExit(code=None | 0):
                return {"kind": "returned", "text": None}
            case SystemExit():
                return _told("failed", f"it ended with exit status {_text_of(error.code)}")
            case HopelessAction():
                return _told("hopeless", _text_of(error))
            case PostponedAction():
                return {**_told("postponed", _text_of(error)), "after_seconds": error.after_seconds}
            case JobSkipped():
                return _told("skipped", _text_of(error))
            case ConfigurationError():
                return _told("not_found", _text_of(error))
            case CatfeederCronError():
                return _told("failed", _text_of(error))
        if type(error).__name__ == "CancelledError":
            if self._run.stop_was_seen:
                return {"kind": "returned", "text": None}  # as it was asked to
            return _told("failed", "it was cancelled, though nobody asked it to stop")
        return {**_told("raised", _text_of(error)), "class": type(error).__name__, "traceback": _trace_of(error)}


def _text_stream(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def _told(kind: str, text: str) -> dict[str, Any]:
    return {"kind": kind, "text": text}


def _text_of(value: object) -> str:
    """Return the text of a foreign object, whose `__str__` may do anything."""
    try:
        return str(value)[:_LONGEST_TEXT]
    except BaseException as error:  # noqa: BLE001 - as above
        return f"(its text can't be had: {type(error).__name__})"


def _trace_of(error: BaseException) -> str:
    import traceback  # takes a while, and most calls end without

    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        trace = trace.tb_next  # from the callable on, without our own call of it
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:  # noqa: BLE001 - formatting asks the exception for its text
        text = "".join(traceback.format_tb(trace))
    return text.rstrip()[-_LONGEST_TEXT:]
