"""One process for an operator's callables, as the daemon sees it."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path

from catfeeder_cron.children.control import ControlPipe
from catfeeder_cron.children.messages import Answer, Request, Returned
from catfeeder_cron.children.output import PrintedOutput
from catfeeder_cron.errors import ChildDied

# The child searches the same path as this process, so it finds the same modules.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from catfeeder_cron.children import guard, worker; "
    "guard.main({parent}, {control}, worker.main)"
)
# A log record may be long; no message of a worker is longer than this.
_LONGEST_ANSWER = 4_000_000
# From asking a process to end to killing it, when no callable runs in it.
_END_SECONDS = 2.0
# From killing to giving up: the guard itself waits five seconds for processes that can't be killed.
_KILL_SECONDS = 10.0
# From the process's end to giving up reading its answers.
_ANSWER_SECONDS = 2.0


class ChildProcess:
    """A guard and its worker, which runs one call at a time.

    All methods are for the event loop that it was started in, so they need no lock.
    """

    def __init__(self, process: Process, control: ControlPipe) -> None:
        assert process.stderr is not None
        self._process = process
        self._control = control
        self._request: Request | None = None
        self._had_deadline = False
        self._was_killed_here = False
        self._output = PrintedOutput(process.stderr)
        self._ended = asyncio.create_task(process.wait())
        self._ended.add_done_callback(lambda _task: self._after_its_end())
        self._given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls) -> "ChildProcess":
        """Start the process. Raises ChildDied where the system has no room for another process."""
        try:
            read_end, write_end = os.pipe()
        except OSError as error:
            raise _not_started(error) from error
        os.set_blocking(write_end, False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(_python(), "-c", _PROGRAM.format(path=sys.path, parent=os.getpid(), control=read_end)),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                pass_fds=[read_end],
                start_new_session=True,  # Ctrl-C in the terminal is meant for this process, which lets a call finish
                limit=_LONGEST_ANSWER,
            )
        except OSError as error:
            os.close(write_end)
            raise _not_started(error) from error
        finally:
            os.close(read_end)
        return cls(process, ControlPipe(write_end))

    @property
    def alive(self) -> bool:
        """Tell whether the process has not ended yet, as far as this process knows."""
        return self._process.returncode is None

    def send(self, request: Request) -> None:
        """Begin a call. The caller awaits its `result` before the next one."""
        self._request = request
        self._output.begin(request)
        self._write(request.as_line())

    async def result(self) -> Returned:
        """Return the result of the call, or raise the error that it ended with.

        Raises CallableRaised for an exception of the callable's own, ChildDied when the process ended before the
        verdict, NotBegun when it ended before it had begun with the call, and DiedAtDeadline when the guard killed it.
        """
        assert self._request is not None
        answer = Answer(self._request)
        reading = asyncio.ensure_future(self._read(answer))
        await asyncio.wait([reading, self._given_up], return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        if answer.verdict is None:
            # Most likely it has ended, and its guard is about to say how. A callable can close our pipes, too.
            await asyncio.wait([self._ended], timeout=_END_SECONDS)
            self.kill()
            ending = await self._ending()
            if not answer.begun and not self._died_at_deadline:
                raise NotBegun(f"its process {ending} before it began")
        await self._output.wait_for_mark()
        if answer.verdict is None:
            raise (DiedAtDeadline if self._died_at_deadline else ChildDied)(f"its process {ending}")
        return answer.result()

    def ask_to_stop(self) -> None:
        """Make `stopping()` return True in the process, and cancel a coroutine that runs there."""
        self._write(b'{"stop": true}\n')

    def set_deadline(self, at: float) -> None:
        """Have the guard kill the call at this time of times.elapsed_seconds, even if this process is gone by then.

        Infinity takes that back.
        """
        self._had_deadline = True
        self._control.set_deadline(at)

    def kill(self) -> None:
        """End the process and everything that it has started, whatever they are doing."""
        self._control.kill()  # not by a signal: the process may have ended, and its number be another's
        if self.alive:
            asyncio.get_running_loop().call_later(_KILL_SECONDS, self._give_up)

    async def end(self) -> None:
        """Let the process end in order within two seconds, else kill it."""
        assert self._process.stdin is not None
        # In words, too: a process that this program has forked holds the pipe open.
        self._write(b'{"end": true}\n')
        self._process.stdin.close()
        await asyncio.wait([self._ended], timeout=_END_SECONDS)
        self.kill()
        await self._ending()
        await self._output.finish()

    async def _read(self, answer: Answer) -> None:
        """Read messages until the verdict, the end of the process, or a line that is too long for a worker's."""
        assert self._process.stdout is not None
        with suppress(ValueError):  # the line is too long
            while answer.verdict is None and (line := await self._process.stdout.readline()):
                answer.take(line)

    async def _ending(self) -> str:
        """Wait until the process has ended, and say how."""
        await asyncio.wait([self._ended], timeout=_KILL_SECONDS)
        if self.alive:  # the guard itself hangs; the kernel sends the worker a signal at the guard's end
            self._was_killed_here = True
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            await asyncio.wait([self._ended], timeout=_KILL_SECONDS)
        status = self._process.returncode
        if self._died_at_deadline:
            return "was still at work at its deadline, and was killed"
        if status == -signal.SIGKILL and not self._was_killed_here:
            return "was killed by SIGKILL, as the system does when memory runs out"
        return _described(status)

    @property
    def _died_at_deadline(self) -> bool:
        return self._had_deadline and self._process.returncode == -signal.SIGALRM

    def _after_its_end(self) -> None:
        self._control.kill()
        # A process that got away from the guard may hold our pipes open.
        asyncio.get_running_loop().call_later(_ANSWER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """Wait for no further answer."""
        if not self._given_up.done():
            self._given_up.set_result(None)

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line)


class NotBegun(ChildDied):
    """The process ended before it began with the call, so the call may be made again."""


class DiedAtDeadline(ChildDied):
    """The deadline of the call passed, so the guard killed the process, or the call was not begun."""


def _python() -> str:
    """Return an interpreter: a server that embeds Python may have put itself in `sys.executable`, or nothing."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sys.exec_prefix, "bin", "python3"))


def _described(status: int | None) -> str:
    """Say how a process ended."""
    if status is None:
        return "does not end, not even when it is killed"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # one of the real-time signals, which have no names
        name = f"signal {-status}"
    return f"was killed by {name}"


def _not_started(error: OSError) -> ChildDied:
    return ChildDied(f"its process could not be started: {error.strerror}")
