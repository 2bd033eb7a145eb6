"""Disks that are full, and a log that nobody reads."""

import fcntl
import json
import os
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.proofs.outages import audits, mounts
from tests.proofs.outages.daemons import NO_RENEWAL, Daemons
from tests.proofs.outages.links import RENEWAL, Links
from tests.proofs.outages.postgresql import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.outage
MakeLinks = Callable[[int], Links]
SIZES = [pytest.param(1, 20, 20, id="short"), pytest.param(4, 200, 60, id="long", marks=pytest.mark.proof)]
PIPE_BYTES = 4096


def require_nothing_lost(daemons: Daemons, cluster: Cluster, oauth: Links) -> None:
    audits.require_all(
        lambda: audits.require_all_at_work(daemons, cluster),
        lambda: oauth.require_stored(cluster),
        lambda: oauth.renew_all(cluster),
        lambda: oauth.require_stored(cluster),
        lambda: audits.require_calm(daemons, 5),
        lambda: audits.require_orderly_end(daemons, cluster),
    )


@pytest.mark.parametrize(("number", "links", "seconds"), SIZES)
def test_the_databases_disk_is_full_for_a_while(
    daemons: Daemons,
    cluster: Callable[..., Cluster],
    folder: Path,
    make_links: MakeLinks,
    number: int,
    links: int,
    seconds: int,
) -> None:
    database = cluster()
    with ExitStack() as stack:
        stack.enter_context(mounts.small_disk(database.folder, "400m"))
        stack.callback(database.end)
        database.create()
        for _ in range(number):
            daemons.add(database.url(), RENEWAL)
        daemons.prepare()
        with database.admin() as connection:  # so that its table grows every few seconds
            connection.execute("ALTER TABLE catfeeder_cron.job_runs SET (fillfactor = 10)")
        oauth = make_links(links)
        oauth.insert(database)
        daemons.start()
        audits.require_all_at_work(daemons, database)
        with mounts.filled(database.folder):
            oauth.fall_due(database)
            time.sleep(seconds)
        if not database.is_running():
            database.start()  # as whoever made room does

        require_nothing_lost(daemons, database, oauth)


@pytest.mark.parametrize(("number", "links", "seconds"), SIZES)
def test_the_disk_of_the_state_is_full_for_a_while(
    daemons: Daemons, primary: Cluster, folder: Path, make_links: MakeLinks, number: int, links: int, seconds: int
) -> None:
    disk = folder / "disk"
    with mounts.small_disk(disk, "2m"):
        for each in range(number):
            daemons.add(primary.url(), RENEWAL, state=disk / str(each))
        daemons.prepare()
        oauth = make_links(links)
        oauth.insert(primary)
        daemons.start()
        audits.require_all_at_work(daemons, primary)
        with mounts.filled(disk):
            oauth.fall_due(primary)
            time.sleep(seconds)
            oauth.require_none_lost()

        require_nothing_lost(daemons, primary, oauth)


@contextmanager
def unread_pipe(path: Path) -> Iterator[int]:
    """A named pipe of one page; yields what a test reads it by, when it cares to."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        yield reader
    finally:
        os.close(reader)


def waiting_in(pipe: int) -> int:
    """Return how many bytes nobody has read yet."""
    (number,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
    return int(number)


def read_for(pipe: int, seconds: float) -> list[str]:
    """Return the lines that come within so many seconds."""
    end, data = time.monotonic() + seconds, b""
    while time.monotonic() < end:
        try:
            data += os.read(pipe, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    return data.decode().splitlines()


@pytest.mark.parametrize(
    "seconds", [pytest.param(25, id="short"), pytest.param(180, id="long", marks=pytest.mark.proof)]
)
def test_a_log_that_nobody_reads_stops_no_job(daemons: Daemons, primary: Cluster, folder: Path, seconds: int) -> None:
    with unread_pipe(folder / "log") as pipe:
        reader = ["sh", "-c", f'exec "$@" >{folder / "log"} 2>&1', "sh"]
        daemon = daemons.add(primary.url(), NO_RENEWAL)
        daemons.prepare()
        daemon.prefix = reader
        daemon.launch()
        full = PIPE_BYTES - 1024
        eventually(lambda: waiting_in(pipe) > full, "the pipe is full")

        time.sleep(seconds)

        audits.require_all(
            lambda: audits.require_all_at_work(daemons, primary, 15),
            lambda: require_told_what_was_dropped(pipe, seconds),
            lambda: audits.require_orderly_end(daemons, primary),
        )


def require_told_what_was_dropped(pipe: int, seconds: float) -> None:
    """When somebody reads again, all that comes is whole entries, and one tells how many are missing."""
    entries = [json.loads(line) for line in read_for(pipe, 15)]
    told = [entry for entry in entries if entry["event"] == "log_lines_dropped"]
    assert told, f"nothing was said of what was dropped: {[entry['event'] for entry in entries][-20:]}"
    assert sum(entry["lines"] for entry in told) > seconds / 2, told
