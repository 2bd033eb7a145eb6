"""The journal of answers: what is in it survives, what is stored is gone from it, and one process owns it."""

import resource
from pathlib import Path
from uuid import uuid4

import pytest

from catfeeder_cron.errors import RenewalError
from catfeeder_cron.renewal.entries import Entry
from catfeeder_cron.renewal.journal import left_journals, new_journal


def entry(id: int, token: str = "access", refresh_token: str | None = "refresh") -> Entry:
    return Entry(id, "00ff", 1.5, token, refresh_token, 3600, lifespan_is_said=True, refresh_lifespan=None)


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
        journal.remove(entry(2, "token with a \\ and a \n and an é"))
        assert left(folder) == []
    [found] = left_journals(folder)
    assert found.owner == owner
    assert {each.id for each in found.entries} == {0, 1, 3, 4}
    assert found.entries[0] == entry(0, "token with a \\ and a \n and an é")
    found.remove()
    assert left(folder) == []


def test_a_stored_answer_leaves_no_trace_and_its_place_is_used_again(tmp_path: Path) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        [file] = files(tmp_path)
        for id in range(300):
            journal.append(entry(id, f"secret-{id}"))
            journal.append(entry(-id, "long" * 500))
            journal.remove(entry(id, f"secret-{id}"))
            journal.remove(entry(-id, "long" * 500))
        assert b"secret" not in file.read_bytes()
        assert file.stat().st_size < 8192
    assert files(tmp_path) == []


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
    """What a power cut may leave of a place that was used again: both are JSON, and so is their mixture."""
    with new_journal(tmp_path, uuid4()) as journal:
        [file] = files(tmp_path)
        images = []
        for id, letter in ((1, "A"), (2, "B")):
            each = entry(id, letter * 600, f"refresh-{letter}")
            journal.append(each)
            images.append(file.read_bytes())
            journal.remove(each)
        journal.keep = True
    one, other = images
    assert len(one) == len(other) == 1024
    file.write_bytes(other[:512] + one[512:])
    [found] = left_journals(tmp_path)
    assert (found.entries, found.unreadable) == ((), 1)


def test_an_answer_that_could_not_be_written_down_is_not_held(tmp_path: Path) -> None:
    with new_journal(tmp_path, uuid4()) as journal:
        journal.append(entry(1))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
        try:
            with pytest.raises(OSError, match="large"):
                journal.append(entry(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (journal.holds(entry(1)), journal.holds(entry(2))) == (True, False)
        journal.remove(entry(2))
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
