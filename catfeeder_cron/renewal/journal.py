"""Keep answers on the local disk from the moment they arrive, and for a while after they are stored in the database.

Each run has a file of its own and holds a lock on it (flock, which the kernel releases however a process ends). So a
journal that can be locked belongs to a run that is over. It holds one line for each answer; space for the answers of
the requests under way is reserved before they are sent. When an answer is stored, its line is marked, or is blanked
where the refresh token that was sent lives on. When all are, the file gets another name, and its answers are kept for
a database that loses its last seconds (kept_answers.py). Only the file's owner may read it (mode 0600), because it
holds tokens.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from catfeeder_cron import lifecycle
from catfeeder_cron.errors import RenewalError
from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.entries import LONGEST_LINE, MARK_AT, SETTLED_MARK, Entry, entry_of, is_settled, line_of
from catfeeder_cron.renewal.kept_answers import kept_name

log = get_logger("catfeeder_cron.oauth")

SUFFIX = ".journal"

# Space is reserved ahead in steps of this size, where the disk has it.
_STEP = 1 << 20


class Journal:
    """The journal of one run. Its methods may not be called from several threads at once, except for `sync`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._closed = False
        self._end = 0
        self._reserved = 0
        self._places: dict[Entry, tuple[int, int]] = {}
        self._has_settled = False
        self.keep = False
        """Whether the file must stay although it is empty: other processes need it to free this run's leases."""
        lifecycle.after_fork(self, Journal._after_fork)

    def reserve(self, answers: int) -> None:
        """Reserve space on the disk for so many further answers. Raises OSError where there is none."""
        needed = self._end + answers * LONGEST_LINE - self._reserved
        if needed <= 0:
            return
        try:
            _allocate(self._descriptor, self._reserved, needed + _STEP)
            self._reserved += needed + _STEP
        except OSError:
            _allocate(self._descriptor, self._reserved, needed)
            self._reserved += needed

    def append(self, entry: Entry) -> None:
        """Write an answer. It then survives the end of this process, and after `sync` a power cut. Raises OSError."""
        line = line_of(entry)
        _write(self._descriptor, line, self._end)
        self._places[entry] = (self._end, len(line))
        self._end += len(line)

    def holds(self, entry: Entry) -> bool:
        """Return whether the answer is in the file, so that it outlives this process."""
        return entry in self._places

    def sync(self) -> None:
        """Return when all appended answers would survive a power cut. Raises OSError."""
        os.fdatasync(self._descriptor)

    def settle(self, entry: Entry) -> None:
        """Note that an answer is stored. If its line can't be marked, it is stored once more, with no effect."""
        if entry in self._places:
            place, size = self._places.pop(entry)
            with suppress(OSError):
                self._has_settled |= _settle(self._descriptor, entry, place, size)

    def _after_fork(self) -> None:
        """Close the inherited file: this process could outlive its parent, and the lock would keep recovery away."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def close(self) -> None:
        """Release the lock. A file with answers stays: for recovery, or else as kept answers; an empty one is removed.

        An empty one stays as well if `keep` is set.
        """
        try:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            if not self._places and not self.keep:
                _finish(self._path, self._descriptor, has_settled=self._has_settled)
        finally:
            self._closed = True
            os.close(self._descriptor)


@dataclass(frozen=True)
class LeftJournal:
    """The journal of a run that is over. This process holds its lock while `left_journals` has it open."""

    owner: UUID
    entries: tuple[Entry, ...]
    """The answers that are not known to be stored."""
    path: Path
    unreadable: int
    """The number of lines that are no entries: a crash of the machine cut them off before they were acknowledged."""
    _descriptor: int
    _end: int
    _places: dict[Entry, tuple[int, int]] = field(repr=False)
    _settled: list[tuple[int, int, float]]
    """The places, sizes and ages of the answers that are stored."""

    def settle(self, entries: Sequence[Entry]) -> None:
        """Note that these answers are stored."""
        for entry in entries:
            place, size = self._places[entry]
            with suppress(OSError):
                if _settle(self._descriptor, entry, place, size):
                    self._settled.append((place, size, entry.age_seconds()))

    def forget_settled(self, older_than_seconds: float) -> None:
        """Blank the lines of old answers that are stored, where the file must stay for the sake of others."""
        for place, size, age_seconds in self._settled:
            if age_seconds > older_than_seconds:
                with suppress(OSError):
                    _blank(self._descriptor, place, size)

    def finish(self) -> None:
        """Have the file's answers kept; delete it if it has none."""
        with suppress(OSError):
            os.ftruncate(self._descriptor, self._end)
        _finish(self.path, self._descriptor, has_settled=bool(self._settled))


@contextmanager
def new_journal(folder: Path, owner: UUID) -> Iterator[Journal]:
    """Create and yield the journal of the run `owner`. Raises RenewalError when it can't be created."""
    try:
        make_folder(folder)
        journal = _create(folder, owner)
    except OSError as error:
        raise can_not_keep(folder, error.strerror or type(error).__name__) from error
    try:
        yield journal
    finally:
        journal.close()


def _create(folder: Path, owner: UUID) -> Journal:
    # The file gets its name after it is locked: a file with such a name and without a lock is a dead run's.
    unnamed, path = folder / f".{owner}", folder / f"{owner}{SUFFIX}"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        give_to_owner_of(folder, unnamed)
        journal = Journal(path, descriptor)
        journal.reserve(1)
        unnamed.rename(path)
        _sync_folder(folder)
    except OSError:
        os.close(descriptor)
        unnamed.unlink(missing_ok=True)
        raise
    return journal


def require_writable(folder: Path) -> None:
    """Raise RenewalError if `folder` can't be written to or created. Creates nothing."""
    place = next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))
    if not place.is_dir():
        raise can_not_keep(folder, f"{place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise can_not_keep(folder, f"{place} is not writable by this user")


def can_not_keep(folder: Path, reason: str) -> RenewalError:
    """Return the error of a run that may not send anything, because of its folder."""
    return RenewalError(
        f"no token is sent, because answers can't be kept in {folder}: {reason}; "
        "make that directory writable or set STATE_DIRECTORY"
    )


def left_journals(folder: Path) -> Iterator[LeftJournal]:
    """Yield the journals that no living process holds, one by one, each locked until the caller asks for the next."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with suppress(FileNotFoundError, BlockingIOError):
            try:
                owner = UUID(path.name.removesuffix(SUFFIX))
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            except (ValueError, OSError) as error:
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


def journals(folder: Path) -> set[Path]:
    """Return the journals in the folder, of living processes and of dead ones."""
    return {path for path in folder.glob(f"*{SUFFIX}") if _owner(path)}


def _read(owner: UUID, path: Path, descriptor: int) -> LeftJournal:
    pending: dict[Entry, tuple[int, int]] = {}
    settled: list[tuple[int, int, float]] = []
    unreadable = place = 0
    with open(descriptor, "rb", closefd=False) as file:
        for line in iter(lambda: file.readline(LONGEST_LINE), b""):
            if line.startswith(b"\0") and not line.strip(b"\0"):
                break  # the reserved space
            if line.strip():
                try:
                    entry = entry_of(line)
                    if is_settled(line):
                        settled.append((place, len(line), entry.age_seconds()))
                    else:
                        pending[entry] = (place, len(line))
                except (ValueError, TypeError):
                    unreadable += 1
            place += len(line)
    return LeftJournal(owner, tuple(pending), path, unreadable, descriptor, place, pending, settled)


def _owner(path: Path) -> UUID | None:
    with suppress(ValueError):
        return UUID(path.name.removesuffix(SUFFIX))
    return None


def _settle(descriptor: int, entry: Entry, place: int, size: int) -> bool:
    """Mark a stored answer, or blank it where its refresh token lives on; return whether it is kept. Raises OSError."""
    if entry.next is None:
        _blank(descriptor, place, size)
        return False
    _write(descriptor, SETTLED_MARK, place + MARK_AT)
    return True


def _blank(descriptor: int, place: int, size: int) -> None:
    _write(descriptor, b" " * (size - 1) + b"\n", place)


def _finish(path: Path, descriptor: int, *, has_settled: bool) -> None:
    if has_settled:
        os.fdatasync(descriptor)
        path.rename(path.with_name(kept_name(path.name.removesuffix(SUFFIX))))
    else:
        path.unlink(missing_ok=True)


def _allocate(descriptor: int, start: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        _write(descriptor, bytes(size), start)


def _write(descriptor: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner may read, and the folders above it. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        give_to_owner_of(folder.parent, folder)


def give_to_owner_of(folder: Path, path: Path) -> None:
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
