"""Fleets of daemons, servers of their own and a transaction pooler, cleaned up after each test."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from catfeeder_cron.database.embedded import EmbeddedServer
from tests.proofs.fleet import Fleet


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def launch(folder: Path) -> Iterator[Callable[..., Fleet]]:
    """Makes a fleet on a database; whatever of it still lives at the end is killed."""
    fleets: list[Fleet] = []

    def make(url: str, interval: int = 1) -> Fleet:
        fleets.append(Fleet(url, folder, interval))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.end()


@pytest.fixture
def pgbouncer(own_server: EmbeddedServer, folder: Path) -> Iterator[str]:
    """The address of a PgBouncer in transaction mode before `own_server`."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    parts = psycopg.conninfo.conninfo_to_dict(own_server.conninfo)
    folder.chmod(0o755)
    home = folder / "pgbouncer"
    home.mkdir()
    home.chmod(0o777)
    config = home / "pgbouncer.ini"
    config.write_text(
        f"""
[databases]
postgres = host={parts["host"]} port={parts["port"]} user=postgres
[pgbouncer]
listen_port = 6432
unix_socket_dir = {home}
auth_type = any
pool_mode = transaction
default_pool_size = 10
server_login_retry = 1
logfile = {home}/log
"""
    )
    as_nobody = ["-u", "nobody"] if os.geteuid() == 0 else []
    process = subprocess.Popen([program, "-q", *as_nobody, str(config)], stderr=subprocess.DEVNULL)
    url = f"postgresql://postgres@/postgres?host={home}&port=6432"
    for _ in range(100):
        try:
            psycopg.connect(url).close()
            break
        except psycopg.OperationalError:
            time.sleep(0.05)
    else:
        raise AssertionError((home / "log").read_text())
    yield url
    process.kill()
    process.wait()
