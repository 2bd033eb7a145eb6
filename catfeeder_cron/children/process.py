"""One process for an operator's callables, as the daemon sees it."""

import asyncio
import json
import logging
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from catfeeder_cron.errors import (
    CallableRaised,
    CatfeederCronError,
    ChildDied,
    ConfigurationError,
    HopelessAction,
    JobSkipped,
    PostponedAction,
)
from catfeeder_cron.logs import TRACEBACK, one_line

# The same modules are found as in this process, wherever it found them.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from catfeeder_cron.children import guard, worker; "
    "guard.main({parent}, {control}, worker.main)"
)
_READ = 65_536
_LONGEST_LINE = 8192
# A log record may be long; what is longer still is no answer of ours.
_LONGEST_ANSWER = 4_000_000
# From asking it to end to killing it, when nobody waits for a callable.
_END_SECONDS = 2.0
# From killing to giving up: the guard itself waits five seconds for what can't be killed.
_KILL_SECONDS = 10.0
# What was printed before the verdict is read before it is told, unless it does not come.
_OUTPUT_SECONDS = 2.0


@dataclass(frozen=True)
class Request:
    """A call of "package.module:function"; without `arguments` it is only imported."""

    reference: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    on_line: Callable[[str], None]
    """Told each line that the callable prints."""
    on_record: Callable[[logging.LogRecord], None]
    """Told each record that it logs."""
    mark: str = field(default_factory=lambda: f"-- {uuid4().hex} --")

    def tell_line(self, line: str) -> None:
        """Pass on a line; whatever a handler of the log raises, what is printed has to be read further."""
        with suppress(Exception):
            self.on_line(line)

    def tell_record(self, record: logging.LogRecord) -> None:
        """Pass on a log record, likewise."""
        with suppress(Exception):
            self.on_record(record)

    def as_line(self) -> bytes:
        message: dict[str, Any] = {"reference": self.reference, "mark": self.mark}
        message["log_level"] = logging.getLogger().getEffectiveLevel()
        if self.arguments is not None:
            # Not JSON: a TOML file has dates and times.
            message["arguments"] = b64encode(pickle.dumps(self.arguments)).decode()
        return json.dumps(message).encode() + b"\n"


@dataclass(frozen=True)
class Returned:
    """What a call came to that raised nothing."""

    text: str | None
    """What it returned, if that is a text."""
    stop_was_seen: bool
    """Whether it was answered that it should stop, or cancelled."""


@dataclass
class _Answer:
    """What was told of a call so far."""

    begun: bool = False
    verdict: dict[str, Any] | None = None
    stop_was_seen: bool = False


class ChildProcess:
    """All methods are for the event loop that it was started in. It runs one call at a time."""

    def __init__(self, process: Process, control: int) -> None:
        self._process = process
        self._control: int | None = control
        self._request: Request | None = None
        self._marked = asyncio.Event()
        self._output = asyncio.create_task(self._read_output())
        self._ended = asyncio.create_task(process.wait())
        self._ended.add_done_callback(lambda _task: self._after_its_end())
        self._given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls) -> "ChildProcess":
        """Raises ChildDied where the system has no room for another process."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(_python(), "-c", _PROGRAM.format(path=sys.path, parent=os.getpid(), control=read_end)),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                pass_fds=[read_end],
                start_new_session=True,  # Ctrl-C in the terminal is meant for us, who let it finish
                limit=_LONGEST_ANSWER,
            )
        except OSError as error:
            os.close(write_end)
            raise ChildDied(f"its process could not be started: {error.strerror}") from error
        finally:
            os.close(read_end)
        return cls(process, write_end)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def send(self, request: Request) -> None:
        """Begin a call, whose `result` is to be awaited before the next one."""
        self._request = request
        self._marked.clear()
        self._write(request.as_line())

    async def result(self) -> Returned:
        """Return what the call came to, or raise what it raised: CallableRaised for an exception of its own, ChildDied
        when the process ended, NotBegun when it ended before it had begun with the call.
        """
        request = self._request
        assert request is not None
        answer = _Answer()
        reading = asyncio.ensure_future(self._read(request, answer))
        await asyncio.wait([reading, self._given_up], return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        if answer.verdict is None:
            # Most likely it has ended, and its guard is about to say how. A callable can close our pipes, too.
            await asyncio.wait([self._ended], timeout=_END_SECONDS)
            self.kill()
            ending = await self._ending()
            if not answer.begun:
                raise NotBegun(f"its process {ending} before it began")
        await self._wait_for_output()
        if answer.verdict is None:
            raise ChildDied(f"its process {ending}")
        return _result(answer.verdict, stop_was_seen=answer.stop_was_seen)

    def ask_to_stop(self) -> None:
        """Have `stopping()` say so there, and a coroutine cancelled."""
        self._write(b'{"stop": true}\n')

    def set_deadline(self, seconds: float) -> None:
        """Have it killed after so many seconds, whatever becomes of this process; 0 takes that back."""
        if self._control is not None:
            with suppress(OSError):
                os.write(self._control, f"{seconds}\n".encode())

    def kill(self) -> None:
        """End the process and all that it has started, whatever they are doing."""
        self._close_control()  # not by a signal: the process may have ended, and its number be another's
        if self.alive:
            asyncio.get_running_loop().call_later(_KILL_SECONDS, self._give_up)

    async def end(self) -> None:
        """Let the process end in order if it soon does, else kill it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await asyncio.wait([self._ended], timeout=_END_SECONDS)
        self.kill()
        await self._ending()
        await asyncio.wait([self._output], timeout=_OUTPUT_SECONDS)
        self._output.cancel()

    async def _read(self, request: Request, answer: _Answer) -> None:
        """Read messages until the verdict, the process's end, or what no worker says."""
        assert self._process.stdout is not None
        with suppress(ValueError):  # a line that is longer than any of ours
            while answer.verdict is None and (line := await self._process.stdout.readline()):
                with suppress(AttributeError, KeyError, TypeError, ValueError):  # the callable has written there
                    self._take(json.loads(line), request, answer)

    def _take(self, message: dict[str, Any], request: Request, answer: _Answer) -> None:
        answer.begun = answer.begun or message.get("begun") == request.mark
        if "log" in message:
            request.tell_record(_record(message["log"]))
        elif "verdict" in message and answer.begun:
            answer.stop_was_seen = bool(message["stop_was_seen"])
            answer.verdict = dict(message["verdict"])

    async def _ending(self) -> str:
        """Wait until the process has ended, and say how."""
        await asyncio.wait([self._ended], timeout=_KILL_SECONDS)
        if self.alive:  # the guard itself hangs; what it watches over gets a signal at its end
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            await asyncio.wait([self._ended], timeout=_KILL_SECONDS)
        return _described(self._process.returncode)

    def _close_control(self) -> None:
        """Let the guard see that nobody has a use for it any more: it kills the others, and then itself."""
        if self._control is not None:
            os.close(self._control)
            self._control = None

    def _after_its_end(self) -> None:
        self._close_control()
        # A process that got away may hold our pipes open.
        asyncio.get_running_loop().call_later(_OUTPUT_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """Wait for no further answer."""
        if not self._given_up.done():
            self._given_up.set_result(None)

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line)

    async def _wait_for_output(self) -> None:
        marked = asyncio.ensure_future(self._marked.wait())
        await asyncio.wait([marked, self._output], timeout=_OUTPUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        marked.cancel()

    async def _read_output(self) -> None:
        """Pass on what is printed, line by line; a line without end in pieces."""
        assert self._process.stderr is not None
        begun = b""
        while read := await self._process.stderr.read(_READ):
            *lines, begun = (begun + read).split(b"\n")
            if len(begun) > _LONGEST_LINE:
                lines, begun = [*lines, begun], b""
            self._pass_on(lines)
        self._pass_on([begun])

    def _pass_on(self, lines: list[bytes]) -> None:
        request = self._request
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if request is not None and text == request.mark:
                self._marked.set()
            elif request is not None and text:
                request.tell_line(text)


def _python() -> str:
    """Return an interpreter: a server that embeds Python may have put itself in `sys.executable`, or nothing."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sys.exec_prefix, "bin", "python3"))


class NotBegun(ChildDied):
    """The process ended before it took the call on: the call may be made again."""


def _record(fields: dict[str, Any]) -> logging.LogRecord:
    """Return a record as if it had been logged here."""
    record = logging.makeLogRecord(
        {
            "name": str(fields["name"]),
            "levelno": int(fields["level"]),
            "levelname": logging.getLevelName(int(fields["level"])),
            "msg": str(fields["text"]),
            "created": float(fields["created"]),
        }
    )
    if fields["traceback"]:
        record.exc_text = str(fields["traceback"])  # for the handlers of a program that embeds us
        setattr(record, TRACEBACK, record.exc_text)
    record.msecs = int(record.created * 1000) % 1000
    return record


def _result(verdict: dict[str, Any], *, stop_was_seen: bool) -> Returned:
    kind, text = verdict["kind"], verdict["text"]
    if kind == "returned":
        return Returned(None if text is None else one_line(text), stop_was_seen)
    reason = one_line(text)
    if kind == "raised":
        raise CallableRaised(one_line(verdict["class"]), reason, verdict["traceback"])
    if kind == "postponed":
        raise PostponedAction(reason, verdict["after_seconds"])
    errors: dict[str, type[CatfeederCronError]] = {
        "hopeless": HopelessAction,
        "skipped": JobSkipped,
        "not_found": ConfigurationError,
    }
    raise errors.get(kind, CatfeederCronError)(reason)


def _described(status: int | None) -> str:
    """Say how a process ended."""
    if status is None:
        return "does not end, not even when it is killed"
    if status >= 0:
        return f"ended with exit status {status}"
    if -status == signal.SIGALRM:
        return "was still at work when its lease ran out, and was killed"
    if -status == signal.SIGKILL:
        return "was killed by SIGKILL, as the system does when memory runs out"
    return f"was killed by {signal.Signals(-status).name}"
