"""Small disks, and a table of hosts of a process's own."""

import errno
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_CHUNK = bytes(64 * 1024)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Have a folder be a file system in memory of this size: "1m"."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        # Whoever has a file open keeps it, and no longer is in anybody's way.
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Leave no byte free on the file system of a folder."""
    file = folder / "filler"
    try:
        fill(file)
        yield
    finally:
        file.unlink()


def fill(file: Path) -> None:
    """Write to a file until there is no room for a further byte."""
    with file.open("ab", buffering=0) as filler:
        for piece in (_CHUNK, b"\0"):
            try:
                while filler.write(piece):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def with_hosts(file: Path) -> Sequence[str]:
    """What a command begins with that finds hosts in this file, which may be written anew while it runs."""
    script = f'mount --bind {shlex.quote(str(file))} /etc/hosts && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


def write_in_place(file: Path, text: str) -> None:
    """Write a file without a moment in which it is empty, or another file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.encode(), 0)
        os.ftruncate(descriptor, len(text.encode()))
    finally:
        os.close(descriptor)
