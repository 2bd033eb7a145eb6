"""The journal of answers: what is in it survives, what is stored is kept apart for a while, and one process owns it."""

import resource
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from catfeeder_cron.errors import RenewalError
from catfeeder_cron.renewal.entries import LONGEST_LINE, Entry, boot_id, line_of
from catfeeder_cron.renewal.journal import left_journals, new_journal
from catfeeder_cron.times import elapsed_seconds


def entry(
    id: int, token: str = "access", refresh_token: str | None = "refresh", sent: str = 32 * "0f", **more: Any
) -> Entry:
    return Entry(id, sent, 1.5, token, refresh_token, 3600, lifespan_is_said=True, refresh_lifespan=None, **more)


def left(folder: Path) -> list[Entry]:
    return [each for journal in left_journals(folder) for each in journal.entries]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def test_what_was_not_removed_is_found_by_the_next_and_only_when_its_owner_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    owner = uuid4()
    with new_journal(folder, owner) as journal:
        for id in range(5):
            journal.append(entry(id, "token with a \\ and a \n and an é"))
        journal.sync()
        journal.settle(entry(2, "token with a \\ and a \n and an é"))
        assert left(folder) == []
    [found] = left_journals(folder)
    assert found.owner == owner
    assert {each.id for each in found.entries} == {0, 1, 3, 4}
    assert found.entries[0] == entry(0, "token with a \\ and a \n and an é")
    for each in left_journals(folder):
        each.settle(each.entries)
        each.finish()
    assert left(folder) == []
    assert [path.suffix for path in files(folder)] == [".answers"]


def test_a_stored_answer_leaves_no_trace_where_the_refresh_token_lives_on(tmp_path: Path) -> None:
    same = sha256(b"the same").hexdigest()
    with new_journal(tmp_path, uuid4()) as journal:
        [file] = files(tmp_path)
        for id in range(300):
            each = entry(id, f"secret-{id}", refresh_token=None if id % 2 else "the same", sent=same)
            journal.append(each)
            journal.settle(each)
        assert b"secret" not in file.read_bytes()
    assert files(tmp_path) == []


def test_it_stays_for_a_while_where_the_refresh_token_is_spent(tmp_path: Path) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        journal.append(entry(1))
        journal.append(entry(2, refresh_token=None))
        journal.settle(entry(1))
        journal.settle(entry(2, refresh_token=None))
    [file] = files(tmp_path)
    assert file.suffix == ".answers"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_bytes().count(b"access") == 1


def test_space_is_reserved_before_an_answer_comes(tmp_path: Path) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        [file] = files(tmp_path)
        journal.reserve(8)
        size = file.stat().st_size
        assert size >= 8 * LONGEST_LINE
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            for id in range(8):
                journal.append(entry(id, "t" * 32_000, '"' * 32_000))
            with pytest.raises(OSError, match="large"):
                journal.reserve(size // LONGEST_LINE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(left(tmp_path)) == 8


def test_no_line_is_longer_than_the_space_for_one() -> None:
    worst = entry(2**63 - 1, '"' * 32_000, '"' * 32_000, sent="f" * 64)
    assert len(line_of(worst)) <= LONGEST_LINE


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "journals"
    with new_journal(folder, uuid4()):
        [file] = files(folder)
        assert file.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", [b'{"id": 7, "sent": "0', b"\0\0\0\0", b"[1, 2]", b'{"id": 1}', b"null"])
def test_a_line_that_a_crash_has_cut_off_costs_no_other(tmp_path: Path, damage: bytes) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        journal.append(entry(1))
        [file] = files(tmp_path)
    with file.open("ab") as again:
        again.write(damage + b"\n")
    [found] = left_journals(tmp_path)
    assert (found.entries, found.unreadable) == ((entry(1),), 1)


def test_half_of_one_line_and_half_of_another_are_no_line(tmp_path: Path) -> None:
    """What a power cut may leave of two lines: both are JSON, and so is their mixture."""
    one, other = (line_of(entry(id, letter * 600)) for id, letter in ((1, "A"), (2, "B")))
    assert len(one) == len(other)
    with new_journal(tmp_path, uuid4()) as journal:
        [file] = files(tmp_path)
        journal.keep = True
    file.write_bytes(other[:400] + one[400:] + one)
    [found] = left_journals(tmp_path)
    assert (found.entries, found.unreadable) == ((entry(1, "A" * 600),), 1)


def test_an_answer_that_could_not_be_written_down_is_not_held(tmp_path: Path) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        journal.append(entry(1))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
        try:
            with pytest.raises(OSError, match="large"):
                journal.append(entry(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (journal.holds(entry(1)), journal.holds(entry(2))) == (True, False)
        journal.settle(entry(2))
        journal.append(entry(3))
    assert {each.id for each in left(tmp_path)} == {1, 3}


def test_a_journal_that_can_not_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    owner = uuid4()
    (tmp_path / f"{owner}.journal" / "in the way").mkdir(parents=True)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RenewalError), new_journal(tmp_path, owner):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    assert files(tmp_path) == []


def test_an_empty_one_that_has_to_stay_stays(tmp_path: Path) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        journal.keep = True
    [found] = left_journals(tmp_path)
    assert found.entries == ()


def test_strange_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.journal").write_text("mine")
    assert left(tmp_path) == []
    assert files(tmp_path)


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RenewalError, match="STATE_DIRECTORY"), new_journal(tmp_path / "file" / "folder", uuid4()):
        pass


def test_an_entry_does_not_show_its_tokens() -> None:
    assert "access" not in repr(entry(1))
    assert "refresh'" not in repr(entry(1))


HOUR = 3600


@pytest.mark.parametrize("clock", [-30 * 86400, -HOUR, HOUR, 30 * 86400])
def test_a_wrong_clock_makes_no_answer_older_or_younger(clock: int) -> None:
    """Its machine has not been restarted since; the clock was set meanwhile."""
    asked = replace(entry(1), asked_at=time.time() + clock, asked_elapsed=elapsed_seconds() - 10, boot=boot_id())
    assert 10 <= asked.age_seconds() < HOUR


def test_after_a_restart_the_wall_clock_counts_as_far_as_it_can_be_right() -> None:
    def age(asked_at: float) -> float:
        return replace(entry(1), asked_at=asked_at, asked_elapsed=1e12, boot="of another start").age_seconds()

    assert 600 <= age(time.time() - 600) < HOUR
    # Nobody knows how old it is: its token is taken to be over, and is renewed at once.
    assert age(time.time() + HOUR) == HOUR
    assert age(time.time() - 30 * 86400) == HOUR


def test_an_answer_of_the_future_of_this_machine_goes_by_the_wall_clock() -> None:
    asked = replace(entry(1), asked_at=time.time() - 5, asked_elapsed=elapsed_seconds() + HOUR, boot=boot_id())
    assert 5 <= asked.age_seconds() < HOUR
