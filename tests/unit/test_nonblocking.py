"""Lines for a descriptor that nobody reads: none is waited for, and each is written whole, or dropped and counted."""

import errno
import fcntl
import gc
import io
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from catfeeder_cron.logs import outputs
from catfeeder_cron.logs.nonblocking import NonBlockingWriter
from tests.support.waiting import SOON

KINDS = ("pipe", "terminal", "socket")
NOTICE = re.compile(r"catfeeder-cron: log_lines_dropped lines=(\d+)\r?\n")


class Channel:
    """A pipe, terminal or socket that nobody reads until `read` is called."""

    def __init__(self, kind: str) -> None:
        match kind:
            case "pipe":
                self.reader, self.writer = os.pipe()
                fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
            case "terminal":
                self.reader, self.writer = pty.openpty()
            case "socket":
                ours, theirs = socket.socketpair()
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                self.reader, self.writer = ours.detach(), theirs.detach()
        self._flow = kind == "terminal"
        if self._flow:
            termios.tcflow(self.writer, termios.TCOOFF)

    def let_flow(self) -> None:
        """End what Ctrl-S began."""
        if self._flow:
            termios.tcflow(self.writer, termios.TCOON)
            self._flow = False

    def read(self, until: str) -> str:
        """Read until the text ends in such a line."""
        self.let_flow()
        text = bytearray()
        while not re.search(f"({until})\r?\n$".encode(), text[-100:]):
            assert select.select([self.reader], [], [], SOON)[0], text[-1000:]
            text += os.read(self.reader, 1 << 16)
        return text.decode()

    def read_all(self) -> str:
        """Read all that is there when nobody writes any more."""
        self.let_flow()
        self.close_writer()
        text = b""
        with suppress(OSError):  # how Linux tells the end of a terminal
            while piece := os.read(self.reader, 1 << 16):
                text += piece
        return text.decode()

    def close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
        self.writer = -1

    def close(self) -> None:
        self.close_writer()
        os.close(self.reader)


@pytest.fixture(params=KINDS)
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    channel = Channel(request.param)
    yield channel
    channel.close()


@pytest.fixture
def pipe() -> Iterator[Channel]:
    channel = Channel("pipe")
    yield channel
    channel.close()


@pytest.fixture
def open_writer() -> Iterator[Callable[[Channel], NonBlockingWriter]]:
    opened: list[NonBlockingWriter] = []

    def open_it(channel: Channel) -> NonBlockingWriter:
        with open(channel.writer, "w", closefd=False) as stream:
            opened.append(NonBlockingWriter(stream))
        return opened[-1]

    yield open_it
    for writer in opened:
        writer.close()
    gc.collect()


Open = Callable[[Channel], NonBlockingWriter]


def test_what_nobody_reads_is_dropped_counted_and_told_without_a_further_line(
    channel: Channel, open_writer: Open
) -> None:
    writer = open_writer(channel)
    for number in range(5000):  # which would take minutes if each waited
        writer.put(f"line {number}\n")

    text = channel.read("log_lines_dropped.*")
    lines = text.splitlines()
    told = NOTICE.search(text)
    assert told
    assert lines[:-1] == [f"line {number}" for number in range(5000 - int(told[1]))]

    writer.put("heard\n")
    assert channel.read("heard").strip() == "heard"


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_that_was_begun_is_finished_before_anything_else(kind: str, open_writer: Open) -> None:
    channel = Channel(kind)
    channel.let_flow()
    writer = open_writer(channel)
    writer.put("a" * 300_000 + "\n")
    writer.put("b\nb\n")

    text = channel.read("lines=2").replace("\r", "")
    assert text == "a" * 300_000 + "\ncatfeeder-cron: log_lines_dropped lines=2\n"
    channel.close()


def test_of_a_line_that_was_begun_a_bounded_part_is_kept(pipe: Channel, open_writer: Open) -> None:
    writer = open_writer(pipe)
    writer.put("a" * (20 << 20) + "\n")

    line, told = pipe.read("lines=1").splitlines()
    assert line.strip("a") == ""
    assert 1 << 20 <= len(line) < 2 << 20
    assert told.endswith("log_lines_dropped lines=1")


def test_the_descriptor_that_others_share_goes_on_waiting_for_its_reader(channel: Channel, open_writer: Open) -> None:
    others = os.dup(channel.writer)
    writer = open_writer(channel)
    writer.put("line\n")
    assert os.get_blocking(channel.writer)
    assert os.get_blocking(others)
    os.close(others)


def test_lines_of_several_threads_stay_whole_and_in_their_order(channel: Channel, open_writer: Open) -> None:
    writer = open_writer(channel)
    threads, lines = 4, 100

    def write(name: int) -> None:
        for number in range(lines):
            writer.put(f"{name} {number} " + "x" * 9000 + "\n")

    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(channel.read("end")))
    reader.start()
    writers = [threading.Thread(target=write, args=[name]) for name in range(threads)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    while reader.is_alive():
        writer.put("end\n")
        reader.join(0.05)

    kept: list[list[int]] = [[] for _ in range(threads)]
    dropped = ends = 0
    for line in read[0].splitlines(keepends=True):
        if told := NOTICE.fullmatch(line):
            dropped += int(told[1])
        elif line.strip() == "end":
            ends += 1
        else:
            found = re.fullmatch(r"(\d) (\d+) x{9000}\r?\n", line)
            assert found, line[:50]
            kept[int(found[1])].append(int(found[2]))
    assert all(numbers == sorted(set(numbers)) for numbers in kept)
    assert sum(map(len, kept)) + dropped >= threads * lines


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_what_cannot_be_opened_again_is_looked_at_before_each_piece(kind: str) -> None:
    """Another user's terminal or pipe can't be opened; the tests may be root's, for whom it can."""
    channel = Channel(kind)
    channel.let_flow()
    output = outputs._polled(channel.writer)
    written = 0
    with suppress(BlockingIOError):
        while True:
            written += output.write(memoryview(b"line\n" * 1000))
    assert written > 0
    assert os.get_blocking(channel.writer)
    output.close()
    assert len(channel.read_all().replace("\r", "")) == written
    channel.close()


def test_a_reader_that_is_gone_raises_nothing_and_the_next_one_is_told(tmp_path: Path, open_writer: Open) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    channel = Channel("pipe")
    channel.close()
    channel.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    channel.writer = os.open(path, os.O_WRONLY)
    writer = open_writer(channel)
    os.close(channel.reader)
    writer.put("lost\n")
    writer.put("lost\n")

    channel.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.put("heard\n")
    assert channel.read("heard") == "catfeeder-cron: log_lines_dropped lines=2\nheard\n"
    channel.close()


def test_what_a_full_disk_does_not_take_is_told_later(tmp_path: Path) -> None:
    """A limit on the size of files takes the place of the full disk."""
    code = """
import resource, signal, sys
from pathlib import Path
from catfeeder_cron.logs.nonblocking import NonBlockingWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
with path.open("w") as stream:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    writer = NonBlockingWriter(stream)
    for _ in range(20):
        writer.put("0123456789\\n")
    assert path.stat().st_size == 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    writer.put("again\\n")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=True, timeout=SOON)
    assert (tmp_path / "log").read_text().splitlines() == [
        *["0123456789"] * 10,
        "catfeeder-cron: log_lines_dropped lines=10",
        "again",
    ]


def test_a_line_that_comes_in_the_middle_of_another_follows_it() -> None:
    """As from a finalizer that logs."""

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            if text == "first\n":
                writer.put("second\n")
            return super().write(text)

    stream = Stream()
    writer = NonBlockingWriter(stream)
    writer.put("first\n")
    writer.put("third\n")
    assert stream.getvalue() == "first\nsecond\nthird\n"


def test_a_stream_that_is_closed_or_broken_raises_nothing() -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, "full")

    closed = io.StringIO()
    closed.close()
    for stream in (closed, Broken()):
        writer = NonBlockingWriter(stream)
        writer.put("line\n")
        writer.close()
        writer.put("line\n")


FORKS = """
import os, sys, threading
from catfeeder_cron.logs.nonblocking import NonBlockingWriter
writer = NonBlockingWriter(sys.stderr)
writer.put("a" * 300_000 + "\\n")
writer.put("dropped\\n")
held, go_on = threading.Event(), threading.Event()

def hold():
    with writer._lock:
        held.set()
        go_on.wait()

threading.Thread(target=hold).start()
held.wait()
if os.fork() == 0:
    writer.put("the child's\\n")
    writer.close()
    os._exit(writer._dropped)
go_on.set()
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
sys.stdin.read()
"""


def test_a_forked_process_waits_for_no_thread_of_its_parent_and_writes_nothing_of_its(pipe: Channel) -> None:
    options = ["-W", "ignore::DeprecationWarning"]
    with subprocess.Popen(
        [sys.executable, *options, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=pipe.writer,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        text = pipe.read("lines=1")
        process.stdin.close()
        assert process.wait(SOON) == 0
    assert text == "a" * 300_000 + "\ncatfeeder-cron: log_lines_dropped lines=1\n"


EVERYTHING = """
import faulthandler, logging, sys, threading, warnings
from catfeeder_cron import logs

def fail():
    raise ValueError("in a thread")

class Unraisable:
    def __del__(self):
        raise ValueError("unraisable")

logs.use_nonblocking_stderr()
logs.configure("debug")
log = logs.get_logger("tests")
for number in range(3000):
    log.info("one", number=number)
    logging.getLogger("other").warning("two")
    print("three", file=sys.stderr)
    warnings.warn(f"four {number}", RuntimeWarning)
logging.captureWarnings(True)
for _ in range(300):
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Unraisable()
for _ in range(300 * IN_C):
    faulthandler.dump_traceback(2)
logs.configure("info", "console")
log.info("six", text="x" * 200_000)
print("begun", file=sys.stderr, end="")
print("done", flush=True)
raise ValueError("at the end")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_process_says_keeps_it_from_its_end(kind: str) -> None:
    """Logs, prints, warnings, tracebacks of Python's and of C's, and what Python itself writes at its end."""
    channel = Channel(kind)
    code = f"IN_C = {kind != 'socket'}\n{EVERYTHING}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=channel.writer, text=True
    ) as process:
        try:
            assert process.wait(SOON) == 1
        finally:
            process.kill()
        assert process.stdout
        assert process.stdout.read() == "done\n"
    channel.close()


@pytest.mark.parametrize("kind", KINDS)
def test_lines_go_as_before_where_somebody_reads(kind: str) -> None:
    channel = Channel(kind)
    channel.let_flow()
    code = """
import sys
from catfeeder_cron import logs
logs.use_nonblocking_stderr()
logs.use_nonblocking_stderr()
logs.configure("info", "json")
logs.configure("info", "json")
logs.get_logger("tests").info("one", text="\\N{CAT FACE}")
print("two", "\\udc80", file=sys.stderr)
sys.stderr.buffer.write(b"three\\n")
assert sys.stderr.fileno() == 2
print("end", file=sys.stderr)
"""
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(channel.read("end")))
    reader.start()
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], stderr=channel.writer, env=environment, check=True, timeout=SOON)
    reader.join(SOON)
    first, *rest = read[0].splitlines()
    assert '"event": "one"' in first
    assert rest == ["two \\udc80", "three", "end"]
    channel.close()


def test_a_process_without_standard_error_logs_to_nowhere() -> None:
    code = "from catfeeder_cron import logs; logs.use_nonblocking_stderr(); logs.configure('info')"
    code += "; logs.get_logger('x').info('lost'); print('done')"
    started = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, preexec_fn=partial(os.close, 2)
    )
    assert started.stdout == b"done\n"
