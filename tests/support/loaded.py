"""Runs commands in copies of one process that has loaded the program: four fifths of a command's time go into that.

What a copy does is what a process of its own would do: it has its own arguments, folder, environment, output and exit
status, and ends as Python ends. What it can't show is how Python and the program start; tests of that start the script.

Run as a program, this is the process that is copied. A request comes over a socket, with the descriptors for standard
output, standard error and the exit status.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn

_LIMIT = 1 << 20


class LoadedProgram:
    """The process that is copied. Its calls may come from several threads."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with its:
            # Standard output is no terminal, as in the copies: Python sets its buffers up once.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(its.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[its.fileno()],
            )

    def __enter__(self) -> "LoadedProgram":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.communicate()

    def run(
        self, *arguments: str, folder: Path, environment: Mapping[str, str], seconds: float
    ) -> tuple[int, str, str]:
        """Run a command to its end; return its exit status and what it printed. Raises TimeoutExpired."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            status = self._run([list(arguments), str(folder), dict(environment)], stdout, stderr, seconds)
            return status, _text(stdout), _text(stderr)

    def _run(self, request: object, stdout: IO[bytes], stderr: IO[bytes], seconds: float) -> int:
        ours, its = socket.socketpair()
        with ours:
            with its:
                descriptors = [stdout.fileno(), stderr.fileno(), its.fileno()]
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            ours.settimeout(seconds)
            pid = _number(ours)
            try:
                return _number(ours)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(request), seconds) from None


def _number(answer: socket.socket) -> int:
    digits = answer.recv(4)
    assert digits, "the process that is copied has ended"
    return int.from_bytes(digits, "little", signed=True)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _serve(requests: socket.socket) -> None:
    """Answer requests until there are no more; return in the copies, and raise what the command ends with."""
    import gc

    from catfeeder_cron import checks, demo, jobs, service  # noqa: F401
    from catfeeder_cron.console import overview, rendering, terminal  # noqa: F401
    from catfeeder_cron.scheduler import crons  # noqa: F401

    jobs.built_in()
    gc.freeze()  # so that the collections of a copy touch no page that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the attendants
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _LIMIT, 3)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _attend(json.loads(message), *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def _attend(request: tuple[list[str], str, dict[str, str]], stdout: int, stderr: int, status: int) -> None:
    """Start the command, wait for it and tell how it ended, as a shell does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(*request, stdout, stderr)
    os.write(status, pid.to_bytes(4, "little"))
    _, how = os.waitpid(pid, 0)
    os.write(status, os.waitstatus_to_exitcode(how).to_bytes(4, "little", signed=True))
    os._exit(0)


def _become(arguments: list[str], folder: str, environment: dict[str, str], stdout: int, stderr: int) -> NoReturn:
    from catfeeder_cron.console.cli import main

    for ours, its in ((stdout, 1), (stderr, 2)):
        os.dup2(ours, its)
        os.close(ours)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["catfeeder-cron", *arguments]
    main()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        _serve(channel)
