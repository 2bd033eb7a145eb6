"""Answers on the local disk, from the moment they are there until they are stored.

Each run has a file of its own and holds a lock on it (flock, which the kernel releases however a process ends), so
a file whose lock can be had belongs to nobody any more. A file is a row of lines; a line goes, its place overwritten
with newlines, when its answer is stored. Places are used again, so that a file grows with what is under way and not
with what has been done. After a power cut a place may hold half of one line and half of another: each line begins with
its checksum. For its owner alone to read (mode 0600): it holds tokens.
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
    """An answer that is to be stored: what is None stays as it is in the row."""

    id: int
    sent: str
    """The hash of the refresh token that was sent, in hex."""
    asked_at: float
    """On the wall clock, which a restart of the machine doesn't set back."""
    token: str | None = field(repr=False)
    refresh_token: str | None = field(repr=False)
    lifespan: int | None
    """Seconds, counted from `asked_at`; as the provider said, or else its usual one."""
    lifespan_is_said: bool
    refresh_lifespan: int | None


class Journal:
    """The journal of one run. Not safe to use from several threads at once, except for `sync`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._closed = False
        self._end = 0
        self._places: dict[Entry, tuple[int, int]] = {}
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self.keep = False
        """Whether the file must stay although it is empty: its being there lets others free this run's leases."""
        lifecycle.after_fork(self, Journal._after_fork)

    def append(self, entry: Entry) -> None:
        """Write an answer down; it survives this process at once, and the machine after `sync`. Raises OSError."""
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
        """Whether the answer is written down, so that it outlives this process."""
        return entry in self._places

    def sync(self) -> None:
        """Return when what was appended before would survive a power cut. Raises OSError."""
        os.fdatasync(self._descriptor)

    def remove(self, entry: Entry) -> None:
        """Forget an answer that is stored. Where its line can't be overwritten, it is stored again, to no effect."""
        if entry in self._places:
            place, size = self._places.pop(entry)
            with suppress(OSError):
                _write(self._descriptor, b"\n" * size, place)
                self._free[size].append(place)

    def _after_fork(self) -> None:
        """Leave the lock to the parent: this process could outlive it, and keep others from taking over."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def close(self) -> None:
        """Leave the file to whoever takes over what is in it; if that is nothing, remove it."""
        try:
            if not self._places and not self.keep:
                self._path.unlink(missing_ok=True)
        finally:
            self._closed = True
            os.close(self._descriptor)


@dataclass(frozen=True)
class LeftJournal:
    """The journal of a run that is over, and is ours as long as `left_journals` has it open."""

    owner: UUID
    entries: tuple[Entry, ...]
    path: Path
    unreadable: int
    """Lines that are no entries: cut off by a crash of the machine before they were acknowledged."""

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@contextmanager
def new_journal(folder: Path, owner: UUID) -> Iterator[Journal]:
    """Yield the journal of the run `owner`. Raises RenewalError where there can be none."""
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
    # It gets its name when it is locked: a file of that name without a lock is a dead run's.
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
    """Raise RenewalError where `folder` could not be written to or made. Nothing is created."""
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
    """Yield the journals that no living process holds, one at a time, each locked until the next is asked for."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with suppress(FileNotFoundError, BlockingIOError):
            try:
                owner = UUID(path.name.removesuffix(_SUFFIX))
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except (ValueError, PermissionError) as error:
                log.warning("oauth_journal_unreadable", journal=str(path), reason=str(error))
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Somebody else may have taken it over and removed it before the lock was ours.
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
    """What root writes by `run-once` must be for the service, under its own user, to take over."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
