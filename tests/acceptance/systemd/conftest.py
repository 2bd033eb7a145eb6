"""A real systemd for these tests, with the program installed on it once: `make test-systemd BOOT=...`.

BOOT is a script that boots one beside the running machine (`BOOT start`, `BOOT run COMMAND...`, `BOOT stop`), or
"host": the tests then install on, and remove from, the machine they run on.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.database.schema.application import create_tables
from tests.acceptance.systemd.doorway import Doorway, database_of
from tests.acceptance.systemd.machine import CONFIG, DROP_IN, UNIT, URL_FILE, Machine

# Where the installed program and what it leaves behind can be.
_PLACES = ("/etc", "/opt", "/usr/local", "/var/lib", "/var/cache", "/srv", "/root")
_LIST = r"find {} -xdev \( -name __pycache__ -o -path /root/.cache \) -prune -o -print 2>/dev/null | sort"


def _reason_to_skip(boot: str) -> str | None:
    if not boot:
        return "no systemd to test on: make test-systemd BOOT=/path/to/boot.sh (or BOOT=host)"
    if os.geteuid() != 0:
        return "root alone can boot a systemd and install on it"
    if boot == "host" and not Path("/run/systemd/system").is_dir():
        return "this machine doesn't run systemd"
    return None if boot == "host" or shutil.which(boot) else f"there is no program {boot}"


@dataclass
class Installed:
    machine: Machine
    before: set[str]
    said: str


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    boot = os.environ.get("CATFEEDER_CRON_BOOT", "")
    if reason := _reason_to_skip(boot):
        pytest.skip(reason)
    machine = Machine(boot)
    machine.start()
    yield machine
    machine.stop()


def files_on(machine: Machine) -> set[str]:
    return set(machine.run("sh", "-c", _LIST.format(" ".join(_PLACES))).splitlines())


@pytest.fixture(scope="session")
def installed(machine: Machine) -> Iterator[Installed]:
    before = files_on(machine)
    yield Installed(machine, before, machine.make("install"))
    machine.make("purge")


@pytest.fixture(scope="session")
def doorway(server: EmbeddedServer) -> Doorway:
    return Doorway(server.conninfo)


@pytest.fixture
def app(database_url: str, doorway: Doorway) -> Iterator[psycopg.Connection]:
    """The superuser in the database that the service has, with Cat Feeder's tables in it."""
    settings = DatabaseSettings.model_validate({"url": database_url})
    with Database(settings) as database:
        for step in (schema.upgrade(database), create_tables(database, settings.tables)):
            list(step)
    doorway.open()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO \"Users\" (username) VALUES ('cat')")
        yield connection
    doorway.shut()


@pytest.fixture
def service(installed: Installed, app: psycopg.Connection, doorway: Doorway, database_url: str) -> Iterator[Machine]:
    """The machine with the service set up, stopped, and without a past."""
    machine = installed.machine
    kept = machine.run("cat", CONFIG)
    machine.write(URL_FILE, doorway.url(database_of(database_url)), "600")
    machine.run("sh", "-c", "journalctl --rotate && journalctl --vacuum-time=1s", text="")
    yield machine
    machine.attempt("systemctl", "stop", UNIT)
    machine.run("rm", "-rf", str(Path(DROP_IN).parent), URL_FILE)
    machine.write(CONFIG, kept)
    machine.systemctl("daemon-reload")
    machine.attempt("systemctl", "reset-failed", UNIT)
