"""The installed program as an operator meets it: processes of its own, real signals, pipes and terminals."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import psycopg

from tests.support.loaded import Copy, LoadedProgram, tidy_environment
from tests.support.waiting import SOON, eventually

_NONE: Mapping[str, str] = MappingProxyType({})

# What the program itself reads, whenever it needs it. Python reads others of its own before there is anything to copy.
_READ_LATER = ("CATFEEDER_CRON_", "NOTIFY_SOCKET", "PYTHONPATH", "TMPDIR", "WATCHDOG_USEC")

ADD_CONNECTIONS = """
    INSERT INTO "Connections" (token, user_id, expiration_date)
    SELECT 'token-' || n || random(), n, now() + CASE WHEN n <= %(expired)s THEN -1 ELSE 1 END * interval '1 day'
    FROM generate_series(1, %(expired)s + %(live)s) AS n"""

SLOW_DOWN_DELETIONS = """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$;
    CREATE TRIGGER slow BEFORE DELETE ON "Connections" FOR EACH STATEMENT EXECUTE FUNCTION wait()"""


def command() -> list[str]:
    """Return how the program is called: by the installed script."""
    return [str(Path(sys.executable).with_name("catfeeder-cron"))]


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it said."""

    status: int
    stdout: str
    stderr: str

    @classmethod
    def of(cls, done: "subprocess.CompletedProcess[str]") -> "Finished":
        """Return what a command has done, which is never a traceback."""
        assert "Traceback" not in done.stderr, done.stderr
        return cls(done.returncode, done.stdout, done.stderr)

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """Standard error, which must be one line of the program's."""
        assert self.stderr.startswith("catfeeder-cron: "), self.stderr
        assert self.stderr.count("\n") == 1, self.stderr
        return self.stderr.strip()


class Running:
    """A command that is under way: its log as it comes, and its end."""

    def __init__(self, process: "subprocess.Popen[str] | Copy", stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.process = process
        self._said: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=each, daemon=True)
            for each in (("stdout", stdout), ("stderr", stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        with self._changed:
            return "".join(self._said["stderr"])

    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the log's entries of this name with these fields, of a log that is JSON."""
        with self._changed:
            return self._find(name, fields)

    def wait_for(self, event: str, *, count: int = 1, seconds: float = SOON, **fields: Any) -> dict[str, Any]:
        """Return the newest of `count` such entries of the log as soon as there are that many."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._find(event, fields)) >= count or not self._is_reading(), timeout=seconds
            )
            entries = self._find(event, fields)
        assert len(entries) >= count, f"no {event} {fields} within {seconds:g} s; the log:\n{self.stderr}"
        return entries[-1]

    def wait_for_text(self, text: str, seconds: float = SOON) -> None:
        """Return as soon as the log, whatever its format, has this text."""
        eventually(lambda: text in self.stderr or self.process.poll() is not None, text, seconds)
        assert text in self.stderr, self.stderr

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, seconds: float = SOON) -> Finished:
        """Wait for the end."""
        status = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
        return Finished(status, *("".join(self._said[name]) for name in ("stdout", "stderr")))

    def stop(self, seconds: float = SOON) -> Finished:
        """Ask it to stop as systemd does, and wait for the end."""
        self.signal(signal.SIGTERM)
        return self.finish(seconds)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.finish()

    def _read(self, name: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._said[name].append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _is_reading(self) -> bool:
        return self.process.poll() is None or any(reader.is_alive() for reader in self._readers)

    def _find(self, name: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in self._said["stderr"] if line.startswith("{")]
        return [entry for entry in entries if entry.items() >= {"event": name, **fields}.items()]


@dataclass
class Program:
    """Runs the program in a folder of the test's own, which is its home too, with a tidy environment.

    A command is a copy of the loaded program, if there is one, unless Python reads one of its environment variables.
    """

    folder: Path
    loaded: LoadedProgram | None
    started: list[Running] = field(default_factory=list)

    def configure(self, url: str, rest: str = "", path: str = "config.toml") -> Path:
        """Write the configuration that is found by default, or another one, and return its path."""
        file = self.folder / path
        file.write_text(f"[database]\nurl = {json.dumps(url)}\n{rest}")
        file.chmod(0o600)
        return file

    def run(self, *arguments: str, seconds: float = 2 * SOON, variables: Mapping[str, str] = _NONE) -> Finished:
        """Run a command to its end with these environment variables."""
        if self.loaded is None or not _are_read_later(variables):
            return self.run_installed(*arguments, seconds=seconds, variables=variables)
        environment = self._environment(variables)
        return Finished.of(self.loaded.run(*arguments, folder=self.folder, environment=environment, seconds=seconds))

    def run_installed(
        self, *arguments: str, seconds: float = 2 * SOON, variables: Mapping[str, str] = _NONE
    ) -> Finished:
        """Run a command to its end with these environment variables, in a process that the installed script starts."""
        return self.run_command(*command(), *arguments, seconds=seconds, variables=variables)

    def run_command(self, *words: str, seconds: float = 2 * SOON, variables: Mapping[str, str] = _NONE) -> Finished:
        """Do as `run` with any other command."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self._environment(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Finished.of(done)

    def start(self, *arguments: str, variables: Mapping[str, str] = _NONE) -> Running:
        """Start a command in a process group of its own; what is left of it is killed after the test."""
        if self.loaded is None or not _are_read_later(variables):
            return self.start_installed(*arguments, variables=variables)
        (stdout, its_stdout), (stderr, its_stderr) = os.pipe(), os.pipe()
        try:
            streams = {"stdout": its_stdout, "stderr": its_stderr}
            copy = self.loaded.start(
                *arguments, folder=self.folder, environment=self._environment(variables), **streams
            )
        finally:
            os.close(its_stdout)
            os.close(its_stderr)
        self.started.append(Running(copy, os.fdopen(stdout), os.fdopen(stderr)))
        return self.started[-1]

    def start_installed(self, *arguments: str, variables: Mapping[str, str] = _NONE) -> Running:
        """Do as `start` in a process that the installed script starts."""
        return self.start_command(*command(), *arguments, variables=variables)

    def start_command(self, *words: str, variables: Mapping[str, str] = _NONE) -> Running:
        """Do as `start` with any other command."""
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=self._environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(Running(process, process.stdout, process.stderr))
        return self.started[-1]

    def daemon(self, *, installed: bool = False) -> Running:
        """Start the daemon, by the installed script or not, and return when it is at work."""
        daemon = self.start_installed("start") if installed else self.start("start")
        daemon.wait_for("daemon_started")
        return daemon

    def run_on_terminal(self, *arguments: str, width: int = 160, seconds: float = 2 * SOON) -> tuple[int, str]:
        """Run a command on a terminal of this width; return its exit status and all that the terminal was sent."""
        return self.run_command_on_terminal(*command(), *arguments, width=width, seconds=seconds)

    def run_command_on_terminal(self, *words: str, width: int = 160, seconds: float = 2 * SOON) -> tuple[int, str]:
        """Do as `run_on_terminal` with any other command."""
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=self._environment({"TERM": "xterm-256color"}),
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)
        sent = b""
        with suppress(OSError):  # how Linux tells the end of a terminal
            while piece := os.read(ours, 65536):
                sent += piece
        os.close(ours)
        return process.wait(seconds), sent.decode()

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        return {**tidy_environment(), "HOME": str(self.folder), **variables}


def _are_read_later(variables: Mapping[str, str]) -> bool:
    return all(name.startswith(_READ_LATER) for name in variables)


ASLEEP = "pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"


def count(connection: psycopg.Connection, rows: str) -> int:
    """Return how many there are: `'"Connections" WHERE expiration_date < now()'`."""
    row = connection.execute(f"SELECT count(*) FROM {rows}".encode()).fetchone()
    assert row is not None
    return int(row[0])
