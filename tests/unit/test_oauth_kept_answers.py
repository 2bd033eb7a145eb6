"""The index of kept answers: what it finds, what it leaves, and when files are deleted."""

import os
import time
import tracemalloc
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import pytest

from catfeeder_cron.renewal.entries import Entry, boot_id, line_of
from catfeeder_cron.renewal.journal import Journal, new_journal
from catfeeder_cron.renewal.kept_answers import KeptAnswers, delete_old
from catfeeder_cron.times import elapsed_seconds


def hashed(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def answer(sent: str, next: str | None, token: str = "access", ago: float = 0, provider: str = "acme") -> Entry:
    return Entry(
        1, hashed(sent), time.time() - ago, token, next, 3600, True, None, elapsed_seconds() - ago, boot_id(), provider
    )


def write(journal: Journal, *entries: Entry) -> None:
    for entry in entries:
        journal.append(entry)
        journal.settle(entry)


def keep(folder: Path, *entries: Entry) -> None:
    with new_journal(folder, uuid4()) as journal:
        write(journal, *entries)


def index(folder: Path) -> KeptAnswers:
    kept = KeptAnswers(folder)
    kept.refresh()
    return kept


def found(kept: KeptAnswers, sent: str) -> str | None:
    entry = kept.find(bytes.fromhex(hashed(sent)), "acme")
    assert entry is None or entry.sent == hashed(sent)
    return entry.refresh_token if entry else None


def test_a_chain_is_followed_to_its_end_over_all_files(tmp_path: Path) -> None:
    keep(tmp_path, answer("b", "c"))
    keep(tmp_path, answer("a", "b"), answer("x", "y"))
    keep(tmp_path, answer("c", "d"))
    kept = index(tmp_path)
    assert [found(kept, token) for token in ("a", "b", "c", "d", "x", "z")] == ["d", "d", "d", None, "y", None]


def test_the_latest_answer_counts(tmp_path: Path) -> None:
    for ago in (20, 10, 30):
        keep(tmp_path, answer("a", f"asked for {ago} s ago", ago=ago))
    assert found(index(tmp_path), "a") == "asked for 10 s ago"


def test_a_refresh_token_that_lives_on_is_sent_again(tmp_path: Path) -> None:
    """Also one that a provider gives out in turn with another."""
    keep(tmp_path, answer("a", None), answer("b", "b"), answer("c", "d"), answer("d", "c"))
    kept = index(tmp_path)
    assert [found(kept, token) for token in ("a", "b", "c", "d")] == [None] * 4


def test_another_providers_answer_is_none(tmp_path: Path) -> None:
    keep(tmp_path, answer("a", "b", provider="another"))
    assert found(index(tmp_path), "a") is None


def test_it_sees_what_a_run_that_is_under_way_writes_and_what_becomes_of_its_file(tmp_path: Path) -> None:
    kept = index(tmp_path)
    with new_journal(tmp_path, uuid4()) as journal:
        write(journal, answer("a", "b"))
        kept.refresh()
        assert found(kept, "a") == "b"
        write(journal, answer("b", "c"))
        assert found(kept, "a") == "b"
        kept.refresh()
        assert found(kept, "a") == "c"
    assert found(kept, "a") == "c"
    kept.refresh()
    assert found(kept, "a") == "c"
    for path in tmp_path.glob("*.answers"):
        path.unlink()
    assert found(kept, "a") is None


def test_torn_lines_and_files_that_are_no_answers_cost_no_other(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    keep(elsewhere, answer("b", "c"))
    folder = tmp_path / "folder"
    keep(folder, answer("a", "b"))
    [file] = folder.iterdir()
    whole = file.read_bytes()
    torn = line_of(answer("q", "r"))
    file.write_bytes(torn[:50] + b"\n" + b"\0" * 600 + b"\n" + torn[60:] + whole + torn[:-1])
    (folder / f"{uuid4()}.answers").symlink_to(next(elsewhere.iterdir()))
    (folder / "notes.answers").write_text("mine")
    (folder / f"{uuid4()}.answers").mkdir()
    kept = index(folder)
    assert [found(kept, token) for token in ("a", "b", "q")] == ["b", None, None]
    assert list(kept.spent()) == [(1, bytes.fromhex(hashed("a")), "acme")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_another_user_costs_no_other(tmp_path: Path) -> None:
    keep(tmp_path, answer("a", "b"))
    [file] = tmp_path.iterdir()
    keep(tmp_path, answer("c", "d"))
    file.chmod(0)
    assert found(index(tmp_path), "c") == "d"


def test_ten_thousand_answers_take_little_memory_and_no_token_stays_in_it(tmp_path: Path) -> None:
    keep(tmp_path, *(answer(f"sent-{number}", f"next-{number}", "token" * 100) for number in range(10_000)))
    tracemalloc.start()
    try:
        kept = index(tmp_path)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 10_000
    assert used < 3_000_000
    assert found(kept, "sent-9999") == "next-9999"


def aged(folder: Path, seconds: float, boot: str | None = None) -> Path:
    """Make a file with an answer of a run that ended so long ago."""
    (folder / "oauth" / "0123").mkdir(parents=True, exist_ok=True)
    path = folder / "oauth" / "0123" / f"{uuid4()}.{boot or boot_id()}-{int(elapsed_seconds() - seconds)}.answers"
    path.write_bytes(line_of(answer("a", "b")))
    return path


def test_old_answers_are_deleted_and_young_ones_stay(tmp_path: Path) -> None:
    old, young = aged(tmp_path, 40), aged(tmp_path, 20)
    delete_old(tmp_path, 35)
    assert (old.exists(), young.exists()) == (False, True)
    delete_old(tmp_path, 10)
    assert not young.exists()


def test_answers_from_before_a_restart_of_the_machine_stay_for_their_time_from_then_on(tmp_path: Path) -> None:
    """No clock tells how old they are: the wall clock may be wrong after a restart."""
    before = aged(tmp_path, 40, boot="another")
    delete_old(tmp_path, 35)
    assert not before.exists()
    [path] = before.parent.iterdir()
    assert path.name.startswith(f"{before.name.partition('.')[0]}.{boot_id()}-")
    delete_old(tmp_path, 35)
    assert path.exists()
    delete_old(tmp_path, 0)
    assert not path.exists()


def test_a_folder_that_is_not_there_has_nothing_old(tmp_path: Path) -> None:
    delete_old(tmp_path / "nowhere", 0)
