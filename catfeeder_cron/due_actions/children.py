"""Processes for the operator's handlers, from the side of the daemon."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

from catfeeder_cron.action import Action
from catfeeder_cron.errors import HopelessAction, PostponedAction
from catfeeder_cron.logs import get_logger, one_line

log = get_logger(__name__)

# The same modules are found as in this process, wherever it found them.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from catfeeder_cron.due_actions.child import main; main({parent})"
_READ = 65_536
_LONGEST_LINE = 8192


class Child:
    """One process. `perform` is not to be called before the last call has returned."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._action: Action | None = None
        self._output = asyncio.create_task(self._log_output())

    @classmethod
    async def start(cls) -> "Child":
        program = _PROGRAM.format(path=sys.path, parent=os.getpid())
        # A group of its own: Ctrl-C is meant for us, who let it finish.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
        return cls(process)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def perform(self, action: Action, reference: str, lease_seconds: float) -> str | None:
        """Return what the handler returned, or raise what it raised; PostponedAction when the process ended."""
        assert self._process.stdout is not None
        self._action = action
        self._send({"call": reference, "action": action.as_json(), "seconds": lease_seconds})
        answer = await self._process.stdout.readline()
        try:
            verdict = json.loads(answer)
        except ValueError:
            self.kill()
            raise PostponedAction(f"its handler's process {_ending(await self._process.wait())}") from None
        detail: str = verdict["detail"] and one_line(verdict["detail"])
        if verdict.get("traceback"):
            log.warning(
                "action_raised", action=action.id, kind=action.kind, reason=detail, traceback=verdict["traceback"]
            )
        if verdict["outcome"] == "hopeless":
            raise HopelessAction(detail)
        if verdict["outcome"] == "postponed":
            raise PostponedAction(detail, verdict.get("after_seconds", 0))
        return detail

    def extend(self, lease_seconds: float) -> None:
        """Let the action in hand go on for as long as its lease."""
        self._send({"seconds": lease_seconds})

    def kill(self) -> None:
        """End the process and what it has started, whatever they are doing."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        self.kill()
        await self._process.wait()
        await self._output

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")

    async def _log_output(self) -> None:
        """Log what handlers print, line by line; a line without end in pieces."""
        assert self._process.stderr is not None
        begun = b""
        while read := await self._process.stderr.read(_READ):
            *lines, begun = (begun + read).split(b"\n")
            if len(begun) > _LONGEST_LINE:
                lines, begun = [*lines, begun], b""
            self._log(lines)
        self._log([begun])

    def _log(self, lines: list[bytes]) -> None:
        action = self._action
        for line in lines:
            if (text := line.decode("utf-8", "replace").rstrip()) and action is not None:
                log.info("action_output", action=action.id, kind=action.kind, line=text)


class Children:
    """The processes of one run: as many as there were ever actions at work at once."""

    def __init__(self) -> None:
        self._idle: list[Child] = []

    async def borrow(self) -> Child:
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                return child
            await child.close()
        return await Child.start()

    async def give_back(self, child: Child, *, usable: bool) -> None:
        if usable and child.alive:
            self._idle.append(child)
        else:
            await child.close()

    async def close(self) -> None:
        for child in self._idle:
            await child.close()


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    if -status == signal.SIGALRM:
        return "was still at work when its lease ran out, and was killed"
    return f"was killed by {signal.Signals(-status).name}"
