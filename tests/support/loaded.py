"""Runs commands in copies of one process that has loaded the program: four fifths of a command's time go into that.

What a copy does is what a process of its own would do: it has its own arguments, folder, environment, output and exit
status, and ends as Python ends. What it can't show is how Python and the program start; tests of that start the script.

Run as a program, this is the process that is copied. A request comes over a socket, with the descriptors for standard
output, standard error and the exit status.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

_LIMIT = 1 << 20
_REQUEST = tuple[list[str], str, dict[str, str], int | None]

# Whatever of these the machine has set would change what the program does.
_NOT_HANDED_DOWN = (
    *("PG", "CATFEEDER", "CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG", "JOURNAL_STREAM"),
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TERM", "COLUMNS", "LINES", "XDG_", "LC_", "LANG", "PYTHONPATH"),
)


def tidy_environment() -> dict[str, str]:
    """Return this process's environment without what would change what the program does."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_DOWN)}


class Copy:
    """A command that is under way, in a session of its own; the methods are those of Popen.

    They may be called from several threads.
    """

    def __init__(self, attendant: socket.socket, words: Sequence[str]) -> None:
        self._attendant = attendant
        self._words = words
        # Held while the exit status is looked for: the attendant tells it once.
        self._lock = threading.Lock()
        self._status: int | None = None
        self.pid = self._number(None)

    def poll(self) -> int | None:
        """Return the exit status; None as long as there is none, or another thread waits for it."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._wait(0)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._lock.release()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, that of a signal negative. Raises TimeoutExpired after so many seconds."""
        with self._lock:
            return self._wait(timeout)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int:
        if self._status is None:
            try:
                self._status = self._number(timeout)
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self._words, timeout or 0) from error
            self._attendant.close()
        return self._status

    def _number(self, timeout: float | None) -> int:
        self._attendant.settimeout(timeout)
        digits = self._attendant.recv(4)
        assert digits, "the process that is copied has ended"
        return int.from_bytes(digits, "little", signed=True)


class LoadedProgram:
    """The process that is copied. Its methods may be called from several threads."""

    def __init__(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with its:
            # Standard output is no terminal, as in the copies: Python sets its buffers up once.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(its.fileno())],
                env=tidy_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[its.fileno()],
            )

    def __enter__(self) -> "LoadedProgram":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.communicate()

    def start(
        self,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str],
        stdout: int,
        stderr: int,
        longest_file: int | None = None,
    ) -> Copy:
        """Start a command that writes to these descriptors, and no file of more than `longest_file` bytes."""
        request: _REQUEST = list(arguments), str(folder), dict(environment), longest_file
        ours, its = socket.socketpair()
        with its:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [stdout, stderr, its.fileno()])
        return Copy(ours, arguments)

    def run(
        self, *arguments: str, folder: Path, environment: Mapping[str, str], seconds: float | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end. Raises TimeoutExpired."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            streams = {"stdout": stdout.fileno(), "stderr": stderr.fileno()}
            copy = self.start(*arguments, folder=folder, environment=environment, **streams)
            try:
                status = copy.wait(seconds)
                return subprocess.CompletedProcess(arguments, status, _text(stdout), _text(stderr))
            finally:
                copy.kill()
                copy.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _serve(requests: socket.socket) -> None:
    """Answer requests until there are no more. In a copy it raises SystemExit, as the command does at its end."""
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
        for descriptor in descriptors:
            os.close(descriptor)


def _attend(request: _REQUEST, stdout: int, stderr: int, status: int) -> NoReturn:
    """Start the command, wait for it and tell how it ended, as a shell does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # a signal to all of the command's process group does not reach the attendant
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(*request, stdout, stderr)
    os.close(stdout)
    os.close(stderr)
    os.write(status, pid.to_bytes(4, "little"))
    _, how = os.waitpid(pid, 0)
    os.write(status, os.waitstatus_to_exitcode(how).to_bytes(4, "little", signed=True))
    os._exit(0)


def _become(
    arguments: list[str], folder: str, environment: dict[str, str], longest_file: int | None, stdout: int, stderr: int
) -> NoReturn:
    from catfeeder_cron.console.cli import main

    os.setsid()
    for ours, its in ((stdout, 1), (stderr, 2)):
        os.dup2(ours, its)
        os.close(ours)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if longest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, longest_file))
    sys.argv = ["catfeeder-cron", *arguments]
    main()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        _serve(channel)
