"""What happens in the daemon, as it is passed on to systemd."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from catfeeder_cron.service.health import Health
from catfeeder_cron.service.sd_notify import Notifier
from catfeeder_cron.service.status import StatusReporter

THREADS = 4
CHANGES = 25


class Changing(Health):
    """Another one whenever it is looked at, and slow to be told of: a number that grows."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def summary(self) -> str:
        words = str(next(self._numbers))
        time.sleep(0.001)
        return words


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        yield manager


def test_statuses_are_told_in_the_order_in_which_they_came_to_be(manager: socket.socket) -> None:
    reporter = StatusReporter(Notifier({"NOTIFY_SOCKET": manager.getsockname()}), Changing())

    def change() -> None:
        for _ in range(CHANGES):
            reporter.beat(True)

    threads = [threading.Thread(target=change) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    told = [int(manager.recv(100).decode().removeprefix("STATUS=")) for _ in range(THREADS * CHANGES)]
    for thread in threads:
        thread.join()

    assert told == sorted(told)
