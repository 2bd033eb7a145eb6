"""Keep answers on the local disk from the moment they arrive until they are stored in the database.

Each run has a file of its own and holds a lock on it (flock, which the kernel releases however a process ends). So a
file that can be locked belongs to a run that is over. A file holds one line for each answer. When an answer is stored,
its line is overwritten with newlines, and its place is used again: so a file's size depends on the answers under way,
not on all that were received. After a power cut a place may hold half of one line and half of another, so each line
begins with its checksum. Only the file's owner may read it (mode 0600), because it holds tokens.
"""

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID
from zlib import crc32

from catfeeder_cron import lifecycle
from catfeeder_cron.errors import RenewalError
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.oauth")

_SUFFIX = ".journal"
_BLOCK = 512  # a line's length is a multiple of it


@dataclass(frozen=True)
class Entry:
    """An answer that has to be stored. A field that is None leaves its column unchanged."""

    id: int
    sent: str
    """The hash of the refresh token that was sent, in hex."""
    asked_at: float
    """When the request was sent, on the wall clock, which goes on over a restart of the machine."""
    token: str | None = field(repr=False)
    refresh_token: str | None = field(repr=False)
    lifespan: int | None
    """Seconds from `asked_at`, as the provider said, or else its usual lifespan."""
    lifespan_is_said: bool
    refresh_lifespan: int | None


class Journal:
    """The journal of one run. Its methods may not be called from several threads at once, except for `sync`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._closed = False
        self._end = 0
        self._places: dict[Entry, tuple[int, int]] = {}
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self.keep = False
        """Whether the file must stay although it is empty: other processes need it to free this run's leases."""
        lifecycle.after_fork(self, Journal._after_fork)

    def append(self, entry: Entry) -> None:
        """Write an answer. It then survives the end of this process, and after `sync` a power cut. Raises OSError."""
        line = _line(entry)
        size = -(-len(line) // _BLOCK) * _BLOCK
        place = self._free[size][-1] if self._free[size] else self._end
        _write(self._descriptor, line.ljust(size, b"\n"), place)
        if place == self._end:
            self._end += size
        else:
            self._free[size].pop()
        self._places[entry] = (place, size)

    def holds(self, entry: Entry) -> bool:
        """Return whether the answer is in the file, so that it outlives this process."""
        return entry in self._places

    def sync(self) -> None:
        """Return when all appended answers would survive a power cut. Raises OSError."""
        os.fdatasync(self._descriptor)

    def remove(self, entry: Entry) -> None:
        """Remove an answer that is stored. If its line can't be overwritten, it is stored once more, with no effect."""
        if entry in self._places:
            place, size = self._places.pop(entry)
            with suppress(OSError):
                _write(self._descriptor, b"\n" * size, place)
                self._free[size].append(place)

    def _after_fork(self) -> None:
        """Close the inherited file: this process could outlive its parent, and the lock would keep recovery away."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def close(self) -> None:
        """Release the lock. A file with answers stays for recovery; an empty one is removed unless `keep` is set."""
        try:
            if not self._places and not self.keep:
                self._path.unlink(missing_ok=True)
        finally:
            self._closed = True
            os.close(self._descriptor)


@dataclass(frozen=True)
class LeftJournal:
    """The journal of a run that is over. This process holds its lock while `left_journals` has it open."""

    owner: UUID
    entries: tuple[Entry, ...]
    path: Path
    unreadable: int
    """The number of lines that are no entries: a crash of the machine cut them off before they were acknowledged."""

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


@contextmanager
def new_journal(folder: Path, owner: UUID) -> Iterator[Journal]:
    """Create and yield the journal of the run `owner`. Raises RenewalError when it can't be created."""
    try:
        _make(folder)
        journal = _create(folder, owner)
    except OSError as error:
        raise _can_not_keep(folder, error.strerror or type(error).__name__) from error
    try:
        yield journal
    finally:
        journal.close()


def _create(folder: Path, owner: UUID) -> Journal:
    # The file gets its name after it is locked: a file with such a name and without a lock is a dead run's.
    unnamed, path = folder / f".{owner}", folder / f"{owner}{_SUFFIX}"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _give_to_owner_of(folder, unnamed)
        unnamed.rename(path)
        _sync_folder(folder)
    except OSError:
        os.close(descriptor)
        unnamed.unlink(missing_ok=True)
        raise
    return Journal(path, descriptor)


def require_writable(folder: Path) -> None:
    """Raise RenewalError if `folder` can't be written to or created. Creates nothing."""
    place = next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))
    if not place.is_dir():
        raise _can_not_keep(folder, f"{place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _can_not_keep(folder, f"{place} is not writable by this user")


def _can_not_keep(folder: Path, reason: str) -> RenewalError:
    return RenewalError(
        f"no token is sent, because answers can't be kept in {folder}: {reason}; "
        "make that directory writable or set STATE_DIRECTORY"
    )


def left_journals(folder: Path) -> Iterator[LeftJournal]:
    """Yield the journals that no living process holds, one by one, each locked until the caller asks for the next."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with suppress(FileNotFoundError, BlockingIOError):
            try:
                owner = UUID(path.name.removesuffix(_SUFFIX))
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except (ValueError, PermissionError) as error:
                log.warning("oauth_journal_unreadable", journal=str(path), reason=str(error))
                continue
            try:
                # Held until the caller asks for the next journal, so that no other process recovers this one meanwhile.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process may have taken it over and removed it before this one got the lock.
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    yield _read(owner, path, descriptor)
            finally:
                os.close(descriptor)


def _read(owner: UUID, path: Path, descriptor: int) -> LeftJournal:
    with open(descriptor, "rb", closefd=False) as file:
        lines = [line for line in file.read().split(b"\n") if line]
    entries, unreadable = [], 0
    for line in lines:
        try:
            entries.append(_entry(line))
        except (ValueError, TypeError):
            unreadable += 1
    return LeftJournal(owner, tuple(entries), path, unreadable)


def _line(entry: Entry) -> bytes:
    text = json.dumps(vars(entry)).encode()
    return b"%08x %b\n" % (crc32(text), text)


def _entry(line: bytes) -> Entry:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % crc32(text):
        raise ValueError("torn")
    return Entry(**json.loads(text))


def _write(descriptor: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _give_to_owner_of(folder.parent, folder)


def _give_to_owner_of(folder: Path, path: Path) -> None:
    """Give a path that root made (by `run-once`) to the folder's owner, so that the service's user can take it over."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
