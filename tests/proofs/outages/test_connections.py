"""Connections that can't be had: none is free, the password is another one, the name means another server."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.proofs.outages import audits, mounts
from tests.proofs.outages.daemons import NO_RENEWAL, Daemon, Daemons
from tests.proofs.outages.postgresql import ROLE, Cluster
from tests.support.servers import port
from tests.support.waiting import eventually

pytestmark = pytest.mark.outage
OUTAGE_SECONDS = 20
NAME = "cats-database.test"
NUMBERS = [pytest.param(1, id="short"), pytest.param(4, id="long", marks=pytest.mark.proof)]
_END_SESSIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND application_name <> 'hog'"
)
_SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND application_name <> 'hog'"


def require_recovered(daemons: Daemons, cluster: Cluster, *further: audits.Check) -> None:
    """All work again, each has told of the outage once and of its end once, and no slot was lost."""
    audits.require_all(
        lambda: audits.require_all_at_work(daemons, cluster),
        lambda: audits.require_said_once(daemons, "database_unreachable"),
        lambda: audits.require_said_once(daemons, "database_reachable_again"),
        lambda: audits.require_calm(daemons, 5),
        lambda: audits.require_orderly_end(daemons, cluster),
        *further,
    )


@contextmanager
def all_connections_taken(cluster: Cluster) -> Iterator[None]:
    """Take every connection that an ordinary role can have, the daemons' too."""
    url = make_conninfo(cluster.url(), application_name="hog")
    with ExitStack() as taken, cluster.admin() as admin:

        def take() -> bool:
            with suppress(psycopg.OperationalError):
                while True:
                    taken.enter_context(psycopg.connect(url))
            if admin.execute(_SESSIONS, [ROLE]).fetchone() == (0,):
                return True
            admin.execute(_END_SESSIONS, [ROLE])
            return False

        eventually(take, "all connections are taken")
        yield


@pytest.mark.parametrize("number", NUMBERS)
def test_connections_that_others_have_taken(daemons: Daemons, primary: Cluster, number: int) -> None:
    for _ in range(number):
        daemons.add(primary.url(), NO_RENEWAL)
    daemons.prepare()
    daemons.start()
    audits.require_all_at_work(daemons, primary)
    with all_connections_taken(primary):
        time.sleep(OUTAGE_SECONDS)
    require_recovered(daemons, primary)


@pytest.mark.parametrize(
    "seconds", [pytest.param(30, id="short"), pytest.param(240, id="long", marks=pytest.mark.proof)]
)
def test_idle_sessions_that_the_server_ends_are_no_outage(daemons: Daemons, primary: Cluster, seconds: int) -> None:
    primary.set("idle_session_timeout", "4s")
    for _ in range(2):
        daemons.add(primary.url(), NO_RENEWAL + "[jobs.tick-seldom]\nsql = 'SELECT 1'\ninterval = 15\n")
    daemons.prepare()
    daemons.start()
    audits.require_all_at_work(daemons, primary)

    time.sleep(seconds)

    audits.require_all(
        lambda: audits.require_all_at_work(daemons, primary),
        lambda: audits.require_never_said(daemons, "database_unreachable"),
        lambda: audits.require_calm(daemons, 2),
        lambda: audits.require_orderly_end(daemons, primary),
    )


def from_pgpass(daemon: Daemon, cluster: Cluster) -> None:
    """Have a daemon find its password in ~/.pgpass, and its address in config.toml."""
    file = daemon.program.folder / ".pgpass"
    file.write_text(f"*:*:*:{ROLE}:{cluster.password}\n")
    file.chmod(0o600)
    without = {key: value for key, value in conninfo_to_dict(cluster.url()).items() if key != "password"}
    daemon.program.configure(make_conninfo("", **without), daemon.jobs)


def from_url_file(daemon: Daemon, cluster: Cluster) -> None:
    """Have a daemon find its address, password and all, in the file that `url_file` names."""
    file = daemon.program.folder / "database-url"
    write_private(file, cluster.url())
    config = daemon.program.configure("", daemon.jobs)
    write_private(config, config.read_text().replace('url = ""', f"url_file = {json.dumps(str(file))}"))


def from_credential(daemon: Daemon, cluster: Cluster) -> None:
    """Have a daemon find its address in a credential of systemd's."""
    folder = daemon.program.folder / "credentials"
    folder.mkdir(exist_ok=True)
    write_private(folder / "database-url", cluster.url())
    daemon.variables = {**daemon.variables, "CREDENTIALS_DIRECTORY": str(folder)}


def write_private(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o600)


@pytest.mark.parametrize(
    "hand_over",
    [pytest.param(from_pgpass, id="pgpass"), pytest.param(from_url_file, id="url_file"), from_credential],
)
def test_a_password_that_is_changed_in_the_database_first(
    daemons: Daemons, primary: Cluster, hand_over: Callable[[Daemon, Cluster], None]
) -> None:
    daemon = daemons.add(primary.url())
    hand_over(daemon, primary)
    daemons.prepare()
    daemons.start()
    audits.require_all_at_work(daemons, primary)
    primary.password = "purr"
    with primary.admin() as connection:
        connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(ROLE), primary.password))
        connection.execute(_END_SESSIONS, [ROLE])
    daemon.lives[-1].wait_for("database_unreachable")
    time.sleep(OUTAGE_SECONDS / 2)
    hand_over(daemon, primary)
    if hand_over is not from_pgpass:  # which libpq reads at each connection
        daemon.lives[-1].signal(signal.SIGHUP)

    require_recovered(daemons, primary, lambda: require_password_taken_over_silently(daemon))


def require_password_taken_over_silently(daemon: Daemon) -> None:
    assert not daemon.events("restart_needed"), "a new password takes no restart"
    assert not any(password in daemon.log for password in ("meow", "purr")), "a password reached the log"


@pytest.mark.parametrize("sessions_left_open", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_a_name_that_comes_to_mean_another_server(
    daemons: Daemons, cluster: Callable[..., Cluster], folder: Path, sessions_left_open: bool
) -> None:
    number = port()
    old, new = (cluster(port=number, address=f"127.0.0.{last}") for last in (2, 3))
    old.create()
    new.follow(old)
    hosts = folder / "hosts"
    mounts.write_in_place(hosts, f"{old.address} {NAME}\n")
    for _ in range(2):
        daemons.add(old.url(address=NAME), NO_RENEWAL, prefix=mounts.with_hosts(hosts))
    daemons.prepare()
    daemons.start()
    audits.require_all_at_work(daemons, old)
    if sessions_left_open:
        old.set("default_transaction_read_only", "on")
        time.sleep(2)
        new.catch_up(old)
    else:
        new.catch_up(old)
        old.stop("fast")
    new.promote()
    mounts.write_in_place(hosts, f"{new.address} {NAME}\n")

    require_recovered(daemons, new)
