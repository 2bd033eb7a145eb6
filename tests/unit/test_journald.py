"""Entries in the journal's protocol, as a socket in journald's place receives them."""

import array
import io
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catfeeder_cron import logs
from catfeeder_cron.logs import get_logger, structured
from catfeeder_cron.logs.journald import JournalHandler, is_journal

Entry = dict[str, str]


class Journal:
    """Reads what journald would."""

    def __init__(self, address: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(address))
        self.socket.settimeout(10)
        self.sealed = 0

    def entry(self) -> Entry:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for _, _, descriptors in ancillary:
            assert data == b""
            (descriptor,) = array.array("i", descriptors)
            with os.fdopen(descriptor, "rb") as file:
                data = os.pread(file.fileno(), os.fstat(descriptor).st_size, 0)
            self.sealed += 1
        return dict(parsed(data))


def parsed(data: bytes) -> Iterator[tuple[str, str]]:
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        yield name.decode(), value.decode()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    address = tmp_path_factory.mktemp("journal") / "socket"
    journal = Journal(address)
    handler = JournalHandler(structured._fields, io.StringIO(), str(address))
    logger = logging.getLogger("tests.journald")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield journal
    logger.removeHandler(handler)
    handler.close()
    journal.socket.close()


log = get_logger("tests.journald")


def test_an_entry_has_its_fields_its_place_in_the_code_and_a_message_for_people(journal: Journal) -> None:
    with logs.context(job="clean-tokens", run_id=7):
        log.info("job_finished", outcome="failed", reason="no such table", deleted=12, duration_seconds=0.25)
    entry = journal.entry()
    assert entry.pop("CODE_FILE") == __file__
    assert int(entry.pop("CODE_LINE")) > 0
    assert entry == {
        "MESSAGE": "job_finished job=clean-tokens run_id=7 outcome=failed"
        ' reason="no such table" deleted=12 duration_seconds=0.25',
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "catfeeder-cron",
        "CODE_FUNC": "test_an_entry_has_its_fields_its_place_in_the_code_and_a_message_for_people",
        "EVENT": "job_finished",
        "LOGGER": "tests.journald",
        "JOB": "clean-tokens",
        "RUN_ID": "7",
        "OUTCOME": "failed",
        "REASON": "no such table",
        "DELETED": "12",
        "DURATION": "0.25",
    }


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")]
)
def test_levels_are_priorities(journal: Journal, level: str, priority: str) -> None:
    getattr(log, level)("hello")
    assert journal.entry()["PRIORITY"] == priority


def test_another_librarys_record_is_an_entry_too(journal: Journal) -> None:
    logging.getLogger("tests.journald.other").warning("%s late", "slot")
    entry = journal.entry()
    assert (entry["MESSAGE"], entry["LOGGER"], entry["CODE_FILE"]) == ("slot late", "tests.journald.other", __file__)
    assert "EVENT" not in entry


def test_a_traceback_is_in_the_message_of_its_own_entry(journal: Journal) -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        log.exception("job_raised", job="x")
    first, *rest = journal.entry()["MESSAGE"].split("\n")
    assert first == "job_raised job=x"
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "RuntimeError: broken"


def test_what_systemd_means_something_else_by_gets_another_name(journal: Journal) -> None:
    log.info("x", message="m", priority="p", unit="u", job_id="j", code_line="c", syslog_pid="s", **{"_x-ä": 1, "1": 2})
    entry = journal.entry()
    assert entry["PRIORITY"] == "6"
    assert {name: value for name, value in entry.items() if name.startswith("FIELD") or name == "X__"} == {
        "FIELD_MESSAGE": "m",
        "FIELD_PRIORITY": "p",
        "FIELD_UNIT": "u",
        "FIELD_JOB_ID": "j",
        "FIELD_CODE_LINE": "c",
        "FIELD_SYSLOG_PID": "s",
        "X__": "1",
        "FIELD": "2",
    }


def test_no_secret_reaches_the_journal(journal: Journal) -> None:
    log.info("x", token="hunter2", url="postgresql://cat:hunter2@db/x")
    assert "hunter2" not in str(journal.entry())


def test_an_entry_of_twenty_megabytes_arrives_whole(journal: Journal) -> None:
    log.info("large", text="x" * 20_000_000)
    entry = journal.entry()
    assert journal.sealed == 1
    assert entry["TEXT"] == "x" * 20_000_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=100), value=st.text())
def test_no_name_and_no_value_breaks_the_entry(journal: Journal, name: str, value: str) -> None:
    logging.getLogger("tests.journald").info("x", extra={"event_dict": {"event": "x", f"f{name}": value}})
    entry = journal.entry()
    assert entry["EVENT"] == "x"
    assert all(key[0].isalpha() and len(key) <= 64 and key.isascii() and key == key.upper() for key in entry)


def read_now(connection: socket.socket) -> bytes:
    """Return all that can be read without waiting."""
    read = b""
    with suppress(BlockingIOError):
        while piece := connection.recv(1 << 20, socket.MSG_DONTWAIT):
            read += piece
    return read


def test_a_stopped_journal_is_waited_for_once_and_tried_again_later(tmp_path: Path) -> None:
    """Nobody reads the socket, and nobody the stream: as with a journald that is stopped."""
    stopped = Journal(tmp_path / "socket")
    ours, theirs = socket.socketpair()
    with ours, theirs, stopped.socket, os.fdopen(ours.detach(), "w") as stream:
        handler = JournalHandler(structured._fields, stream, str(tmp_path / "socket"))
        logger = logging.getLogger("tests.stopped")
        logger.propagate = False
        logger.addHandler(handler)
        took = []
        for _ in range(2000):  # which would take half an hour if each waited
            begun = time.monotonic()
            logger.error("x" * 5000)
            took.append(time.monotonic() - begun)
        assert max(took) >= 0.1
        in_the_stream = read_now(theirs)
        assert in_the_stream.startswith(b"<3>xxx")

        stopped.socket.settimeout(0)
        received = [stopped.entry()]
        with suppress(BlockingIOError):
            while True:
                received.append(stopped.entry())
        handler._try_again_at = 1.0  # long ago
        logger.error("back again")
        received.append(stopped.entry())
        assert (received[-1]["EVENT"], received[-1]["PRIORITY"]) == ("log_lines_dropped", "4")
        in_the_stream += read_now(theirs)
        # A notice is short, and may find room where the next entry finds none.
        told = [entry["LINES"] for entry in received if entry.get("EVENT") == "log_lines_dropped"]
        told_there = re.findall(rb"^<4>log_lines_dropped lines=(\d+)$", in_the_stream, re.MULTILINE)
        written = len(received) - len(told) + in_the_stream.count(b"<3>xxx")
        assert written + sum(map(int, told)) + sum(map(int, told_there)) == 2000
        assert stopped.entry()["MESSAGE"] == "back again"
        handler.close()


def test_without_a_journal_every_line_has_its_priority_on_the_stream(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = JournalHandler(structured._fields, stream, str(tmp_path / "nobody"))
    logger = logging.getLogger("tests.absent")
    logger.propagate = False
    logger.addHandler(handler)
    logger.warning("one\ntwo")
    handler.close()
    assert stream.getvalue() == "<4>one\n<4>two\n"


def test_auto_is_the_journal_where_systemd_says_that_standard_error_is_it(tmp_path: Path) -> None:
    code = "from catfeeder_cron import logs; logs.configure('info'); logs.get_logger('x').info('hello')"
    for number, json_expected in ((0, False), (1, True)):
        with (tmp_path / "stderr").open("w+b") as file:
            status = os.fstat(file.fileno())
            environment = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + number}"}
            subprocess.run([sys.executable, "-c", code], stderr=file, env=environment, check=True)
            # A prefixed line, or nothing where this machine has a journal.
            assert (tmp_path / "stderr").read_text().startswith("{") is json_expected


def test_a_stream_without_a_file_is_no_journal() -> None:
    assert not is_journal(io.StringIO())
