"""Find answers that were stored already, for rows that hold a spent refresh token again; delete the old ones.

A server that lost its last seconds, or a restored backup, has rows as they were before a renewal. Sending their refresh
tokens again would cost those links. The files are the journals of runs (journal.py): of those that are under way, and
of those that are over, whose names then tell when they ended: OWNER.BOOT-SECONDS.answers.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from catfeeder_cron.logs import get_logger
from catfeeder_cron.renewal.entries import LONGEST_LINE, Entry, boot_id, entry_of, replaced_hash
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.oauth")

_KEPT = ".answers"
_RUNNING = ".journal"
_OFFSET_BITS = 44


class Spent(NamedTuple):
    """A refresh token that was sent: its row, its hash, its provider."""

    id: int
    sent: bytes
    provider: str


class KeptAnswers:
    """An index of the answers in a folder: the hashes' first bytes alone are in memory, some 150 bytes for each.

    Not safe under concurrency. Files that come, grow, go or get another name meanwhile are no error.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[int, int] = {}
        self._owners: list[str] = []
        self._numbers: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._ends: dict[str, int] = {}
        self._unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Take in the answers that were written since the last call."""
        names: dict[str, str] = {}
        with suppress(FileNotFoundError), os.scandir(self._folder) as found:
            for each in found:
                owner, _, rest = each.name.partition(".")
                if owner and f".{rest}".endswith((_KEPT, _RUNNING)):
                    names[owner] = each.name
        before, self._names = self._names, names
        for owner, name in names.items():
            if before.get(owner) != name or name.endswith(_RUNNING):
                self._scan(owner, name)

    def find(self, sent: bytes, provider: str) -> Entry | None:
        """Return the answer that a row of this provider should get, by the hash of its refresh token.

        Returns None if that refresh token was never spent here. If the refresh token in the answer was sent as well,
        that answer counts, and so on to the latest. The result has `sent` as its own hash.
        """
        found, wanted, seen = None, sent.hex(), set[str]()
        while wanted not in seen and (entry := self._entry(wanted)) and entry.provider == provider:
            seen.add(wanted)
            found, wanted = entry, entry.next or wanted
        # A provider that gives out a refresh token again leaves the row with one that is good.
        return replace(found, sent=sent.hex()) if found and wanted != sent.hex() else None

    def spent(self) -> Iterator[Spent]:
        """Yield every refresh token that was sent and replaced."""
        for owner in list(self._numbers):
            with suppress(FileNotFoundError), self._open(owner) as file:
                for _, line in _lines(file):
                    with suppress(ValueError, TypeError):
                        if replaced_hash(line):
                            entry = entry_of(line)
                            yield Spent(entry.id, bytes.fromhex(entry.sent), entry.provider)

    def _scan(self, owner: str, name: str) -> None:
        try:
            file = _opened(self._folder / name)
        except FileNotFoundError:
            return
        except OSError as error:
            if name not in self._unreadable:
                self._unreadable.add(name)
                log.warning("oauth_answers_unreadable", file=str(self._folder / name), reason=error.strerror)
            return
        number = self._numbers.setdefault(owner, len(self._owners))
        if number == len(self._owners):
            self._owners.append(owner)
        with file:
            file.seek(self._ends.get(owner, 0))
            for offset, line in _lines(file):
                self._ends[owner] = offset + len(line)
                with suppress(ValueError, TypeError):
                    if replaced := replaced_hash(line):
                        self._add(_key(replaced.decode()), number << _OFFSET_BITS | offset, line)

    def _add(self, key: int, place: int, line: bytes) -> None:
        other = self._at(self._places[key]) if key in self._places else None
        if other is None or not other.is_newer_than(entry_of(line)):
            self._places[key] = place

    def _entry(self, sent: str) -> Entry | None:
        place = self._places.get(_key(sent))
        entry = None if place is None else self._at(place)
        return entry if entry and entry.sent == sent else None

    def _at(self, place: int) -> Entry | None:
        owner = self._owners[place >> _OFFSET_BITS]
        try:
            with self._open(owner) as file:
                file.seek(place & (1 << _OFFSET_BITS) - 1)
                return entry_of(file.readline(LONGEST_LINE))
        except (OSError, ValueError, TypeError):
            return None  # too old, and deleted meanwhile

    def _open(self, owner: str) -> BinaryIO:
        try:
            return _opened(self._folder / self._names.get(owner, owner))
        except FileNotFoundError:  # the run has ended, and its file has another name
            for path in self._folder.glob(f"{owner}.*"):
                return _opened(path)
            raise


def kept_name(owner: str) -> str:
    """Return the name for the file of a run that ends now."""
    return f"{owner}.{boot_id()}-{int(elapsed_seconds())}{_KEPT}"


def delete_old(state_directory: Path, keep_seconds: float) -> None:
    """Delete the answers of runs that ended longer ago, for all databases. An error is logged, and nothing raised.

    The age is measured by the clock that nobody sets. After a restart of the machine it counts from the first call.
    """
    try:
        for path in (state_directory / "oauth").glob(f"*/*{_KEPT}"):
            owner, _, stamp = path.name.removesuffix(_KEPT).partition(".")
            boot, _, ended = stamp.partition("-")
            age = elapsed_seconds() - int(ended) if boot == boot_id() and ended.isdecimal() else -1
            with suppress(FileNotFoundError):  # another process did the same
                if keep_seconds <= 0 or age > keep_seconds:
                    path.unlink()
                elif age < 0:
                    path.rename(path.with_name(kept_name(owner)))
    except OSError as error:
        log.warning("oauth_answers_not_deleted", folder=str(state_directory), reason=error.strerror)


def _key(sent: str) -> int:
    return int(sent[:16], 16)


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the whole lines from the file's position on, with their offsets, as far as they are written."""
    offset = file.tell()
    for line in iter(lambda: file.readline(LONGEST_LINE), b""):
        if not line.endswith(b"\n"):
            return  # the reserved space, or a line that is being written
        yield offset, line
        offset += len(line)
