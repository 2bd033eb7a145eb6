"""A daemon whose log nobody reads: its jobs, its heartbeats and its stop wait for nobody."""

import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import psycopg
import pytest

from tests.support.loaded import tidy_environment
from tests.support.program import Program, command, count
from tests.support.waiting import SOON, eventually

CONFIG = """
    [jobs.test-hello-world]
    enabled = true
    interval = 1
    """
RUNS = "catfeeder_cron.job_runs WHERE outcome = 'succeeded'"


@contextmanager
def full(kind: str) -> Iterator[tuple[int, int]]:
    """Yield the two ends of what takes nothing any more: for the reader, and for the daemon."""
    if kind == "socket":
        ours, theirs = socket.socketpair()
        ends = ours.detach(), theirs.detach()
    elif kind == "terminal":
        ends = pty.openpty()
    else:
        ends = os.pipe()
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    if kind == "terminal":
        termios.tcflow(ends[1], termios.TCOOFF)
    else:
        os.set_blocking(ends[1], False)
        for piece in (b"-" * 100, b"\n"):
            with suppress(BlockingIOError):
                while True:
                    os.write(ends[1], piece)
        os.set_blocking(ends[1], True)
    yield ends
    for end in ends:
        os.close(end)


@contextmanager
def daemon(
    program: Program, stderr: int, preexec_fn: Callable[[], None] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [*command(), "start"],
        cwd=program.folder,
        env={**tidy_environment(), "HOME": str(program.folder)},
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=preexec_fn,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(reader: int, until: str) -> list[str]:
    """Read until a line has this text."""
    read = b""
    while until.encode() not in read.rpartition(b"\n")[0]:
        assert select.select([reader], [], [], SOON)[0], read.decode()
        read += os.read(reader, 65_536)
    return read.decode().splitlines()


@pytest.mark.usefixtures("app_tables")
@pytest.mark.parametrize("kind", ["pipe", "terminal", "socket"])
def test_jobs_go_on_and_a_stop_ends_it_while_nobody_reads(
    program: Program, admin: psycopg.Connection, database_url: str, kind: str
) -> None:
    program.configure(database_url, CONFIG)
    with full(kind) as (_, stderr), daemon(program, stderr) as process:
        eventually(lambda: count(admin, RUNS) >= 3, "three runs")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
    assert count(admin, "catfeeder_cron.daemons") == 0


@pytest.mark.usefixtures("app_tables")
def test_heartbeats_go_on_and_a_reader_that_comes_back_is_told_how_many_lines_are_missing(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, CONFIG)
    with full("pipe") as (reader, stderr), daemon(program, stderr) as process:
        eventually(lambda: count(admin, RUNS) >= 2, "two runs")
        admin.execute("UPDATE catfeeder_cron.daemons SET heartbeat_at = 'epoch'")
        eventually(lambda: count(admin, "catfeeder_cron.daemons WHERE heartbeat_at > 'epoch'"), "a heartbeat")
        told = next(
            entry
            for entry in map(json.loads, filter(lambda line: line.startswith("{"), lines(reader, "log_lines_dropped")))
            if entry["event"] == "log_lines_dropped"
        )
        assert told["level"] == "warning"
        assert told["lines"] >= 3  # the start, and each run
        assert "job" not in told

        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)  # there is room for all that comes now
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
        assert any("daemon_stopped" in line for line in lines(reader, "daemon_stopped"))


@pytest.mark.usefixtures("app_tables")
def test_without_standard_output_and_error_it_runs_and_stops_in_order(
    program: Program, admin: psycopg.Connection, database_url: str
) -> None:
    program.configure(database_url, CONFIG)
    with daemon(program, subprocess.DEVNULL, partial(os.closerange, 1, 3)) as process:
        eventually(lambda: count(admin, RUNS), "a run")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
