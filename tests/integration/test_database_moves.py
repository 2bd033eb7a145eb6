"""What becomes of connections whose server falls silent, or takes no writes, or whose address means another server."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.config import load as load_settings
from catfeeder_cron.database import Connection, Database, Lifeline, single
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable
from catfeeder_cron.job import JobContext
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("embedded_alone")

OpenDatabase = Callable[..., Database]
OUTAGE = ["database_unreachable", "database_reachable_again"]
READ_ONLY = "default_transaction_read_only"


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "catfeeder_cron")


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage().split()[0] for r in caplog.records if r.name == "catfeeder_cron.database"]


@pytest.fixture
def proxy(server: EmbeddedServer, database_url: str) -> Iterator[Proxy]:
    with Proxy(database_url) as proxy:
        yield proxy


@pytest.fixture
def lifeline(open_database: OpenDatabase, proxy: Proxy) -> Lifeline:
    return open_database(proxy.conninfo).lifeline(1)


def backend(lifeline: Lifeline) -> int:
    return int(lifeline.query("SELECT pg_backend_pid()", {})[0][0])


def works(database: Database) -> bool:
    try:
        return database.query("SELECT 1", {}) == [(1,)]
    except DatabaseUnavailable:
        return False


# Silence


def test_a_lifeline_keeps_its_connection_and_makes_a_new_one_after_an_error(
    lifeline: Lifeline, admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    first = backend(lifeline)
    assert backend(lifeline) == first

    with pytest.raises(DatabaseError, match="division by zero"):
        lifeline.query("SELECT 1 / 0", {})
    assert backend(lifeline) == first
    admin.execute("SELECT pg_terminate_backend(%s, 10000)", [first])
    assert backend(lifeline) != first
    assert events(caplog) == []


def test_a_lifeline_gives_up_a_server_that_acknowledges_and_never_answers(
    lifeline: Lifeline, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    backend(lifeline)
    proxy.silence()

    for why in ("the server did not answer within 1 s", "timeout expired"):  # a statement, then a new connection
        with pytest.raises(DatabaseUnavailable, match=why):
            backend(lifeline)
    proxy.heal()
    backend(lifeline)

    assert events(caplog) == OUTAGE


def test_a_lifeline_gives_up_a_server_that_is_frozen(lifeline: Lifeline) -> None:
    pid = backend(lifeline)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(DatabaseUnavailable, match="did not answer within 1 s"):
            backend(lifeline)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert backend(lifeline) != pid


def test_a_lifeline_gives_up_a_statement_that_takes_too_long(lifeline: Lifeline) -> None:
    with pytest.raises(DatabaseUnavailable, match="did not answer within 1 s"):
        lifeline.query("SELECT pg_sleep(1000)", {})


def test_a_lifeline_gives_up_a_name_that_is_not_resolved(
    open_database: OpenDatabase, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, resolve = threading.Event(), threading.Event()
    hosts: list[str] = []

    def hang(host: str, *args: Any, **options: Any) -> list[Any]:
        hosts.append(host)
        asked.set()
        resolve.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (proxy.host, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    lifeline = open_database(make_conninfo(proxy.conninfo, host="db.example")).lifeline(0.2)

    for _ in range(3):
        with pytest.raises(DatabaseUnavailable, match="could not translate host name"):
            backend(lifeline)
    resolve.set()
    assert hosts == ["db.example"], "one look-up hangs, not one for each"
    eventually(lambda: not [each for each in threading.enumerate() if each.name.startswith("resolve-")])
    assert backend(lifeline)


def test_a_lifeline_reaches_the_second_host_when_the_first_says_nothing(
    open_database: OpenDatabase, proxy: Proxy
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        both = make_conninfo(proxy.conninfo, host=f"127.0.0.1,{proxy.host}", port=f"{port},{proxy.port}")
        assert backend(open_database(both).lifeline(2))


def test_who_waits_for_a_lifeline_gives_up_in_time_as_well(lifeline: Lifeline) -> None:
    backend(lifeline)
    failed: list[DatabaseUnavailable] = []

    def use() -> None:
        try:
            lifeline.query("SELECT pg_sleep(1000)", {})
        except DatabaseUnavailable as error:
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 4


def test_a_lifeline_is_closed_with_its_database_and_stays_closed(
    open_database: OpenDatabase, database_url: str, admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(database_url)
    lifeline, unused = database.lifeline(5), database.lifeline(5)
    pid = backend(lifeline)

    database.close()
    lifeline.close()

    eventually(lambda: not admin.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall())
    for each in (lifeline, unused):
        with pytest.raises(DatabaseUnavailable, match="has closed its connections"):
            backend(each)
    assert events(caplog) == []


def test_a_forked_process_has_a_lifeline_of_its_own(lifeline: Lifeline) -> None:
    before = backend(lifeline)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(backend(lifeline)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as told:
        assert int(told.read()) != before
    assert backend(lifeline) == before


def test_a_statement_whose_server_falls_silent_ends_after_its_own_limit_and_some_time(
    open_database: OpenDatabase, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(proxy.conninfo, connect_timeout=2, statement_timeout=1)

    def work(begun: AbstractContextManager[Connection]) -> None:
        with begun as connection:
            proxy.silence()
            connection.execute("SELECT 1")

    with pytest.raises(DatabaseUnavailable, match=r"did not answer within 2\.5 s"):
        work(database.transaction(timeout=timedelta(seconds=0.5)))
    proxy.heal()
    assert works(database)
    with pytest.raises(DatabaseUnavailable, match="did not answer within 3 s"):
        work(database.session())
    proxy.heal()

    assert events(caplog) == OUTAGE


def test_a_session_without_a_limit_waits_as_long_as_it_takes(open_database: OpenDatabase, database_url: str) -> None:
    with open_database(database_url, connect_timeout=1, statement_timeout=1).session(unbounded=True) as session:
        assert single(session, "SELECT pg_sleep(2.5)") == ("",)


def test_a_cut_connection_is_found_in_seconds(
    database: Database, open_database: OpenDatabase, database_url: str
) -> None:
    with database.session() as session:
        given = session.info.get_parameters()
    assert (given["keepalives_idle"], given["keepalives_interval"], given["keepalives_count"]) == ("5", "3", "5")
    assert given["tcp_user_timeout"] == "20000"
    with open_database(make_conninfo(database_url, tcp_user_timeout=60_000)).session() as session:
        assert session.info.get_parameters()["tcp_user_timeout"] == "60000"


# Read-only servers


@pytest.fixture
def switch(server: EmbeddedServer, own_server: EmbeddedServer) -> Iterator[Callable[[EmbeddedServer, str], None]]:
    """Has a server take no writes ("on"), or take them again ("off"); sessions stay open."""
    admins = {each: psycopg.connect(each.conninfo, autocommit=True) for each in (server, own_server)}

    def set_to(which: EmbeddedServer, value: str) -> None:
        admins[which].execute(f"ALTER SYSTEM SET {READ_ONLY} = {value}".encode())
        admins[which].execute("SELECT pg_reload_conf()")

        def is_set() -> bool:
            with psycopg.connect(which.conninfo) as new:
                return new.execute(f"SHOW {READ_ONLY}".encode()).fetchone() == (value,)

        eventually(is_set)

    yield set_to
    for each, admin in admins.items():
        set_to(each, "off")
        admin.close()


Switch = Callable[[EmbeddedServer, str], None]


def both(*servers: EmbeddedServer) -> str:
    given = [conninfo_to_dict(each.conninfo) for each in servers]
    hosts, ports = (",".join(str(each[key]) for each in given) for key in ("host", "port"))
    return make_conninfo(servers[0].conninfo, host=hosts, port=ports)


def where(database: Database) -> str:
    return str(database.query("SELECT current_setting('data_directory')", {})[0][0])


def fill_pool(database: Database, connections: int) -> None:
    with ExitStack() as stack:
        for _ in range(connections):
            stack.enter_context(database.transaction())


def write(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute("CREATE TABLE written ()")
        connection.execute("DROP TABLE written")


@pytest.mark.parametrize("attributes", ["any", "read-write"])
def test_after_a_switch_over_with_open_sessions_all_work_is_done_on_the_other_server(
    open_database: OpenDatabase,
    server: EmbeddedServer,
    own_server: EmbeddedServer,
    switch: Switch,
    attributes: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    switch(own_server, "on")
    database = open_database(make_conninfo(both(own_server, server), target_session_attrs=attributes))
    lifeline = database.lifeline(10)
    before = where(database)
    fill_pool(database, 4)
    backend(lifeline)
    with ExitStack() as stack:
        session = stack.enter_context(database.session())
        switch(own_server, "off")
        switch(server, "on")

        write(database)
        for _ in range(5):
            assert where(database) != before
        assert lifeline.query("SELECT current_setting('data_directory')", {})[0][0] != before
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
    assert events(caplog) == [], "there was a server that takes writes all the time"


@pytest.mark.parametrize("reported", [True, False], ids=["the server reports it", "a pooler reports nothing"])
def test_a_server_that_takes_no_writes_is_told_once_as_unreachable(
    open_database: OpenDatabase,
    own_server: EmbeddedServer,
    switch: Switch,
    reported: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Proxy(own_server.conninfo) as proxy:
        if not reported:
            proxy.change = lambda said: said.replace(READ_ONLY.encode(), READ_ONLY.upper().encode())
        database = open_database(proxy.conninfo, connect_timeout=5)
        lifeline = database.lifeline(5)
        fill_pool(database, 3)
        backend(lifeline)
        switch(own_server, "on")

        for _ in range(4):
            with pytest.raises(DatabaseUnavailable, match="takes no writes: default_transaction_read_only is on"):
                write(database)
            with pytest.raises(DatabaseUnavailable):
                database.query("CREATE TABLE written ()", {})
            with pytest.raises(DatabaseUnavailable):
                lifeline.query("CREATE TABLE written ()", {})
        assert "takes no writes" in database.trouble
        switch(own_server, "off")
        for _ in range(4):
            write(database)
            backend(lifeline)

    assert events(caplog) == OUTAGE


def test_a_proxy_that_comes_to_mean_another_server_is_followed(
    open_database: OpenDatabase, server: EmbeddedServer, own_server: EmbeddedServer, switch: Switch
) -> None:
    with Proxy(server.conninfo) as proxy:
        database = open_database(proxy.conninfo)
        before = where(database)
        fill_pool(database, 4)
        proxy.mean(own_server.conninfo)
        switch(server, "on")

        write(database)
        assert where(database) != before


def test_a_transaction_that_was_made_read_only_is_no_outage(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DatabaseError) as caught, database.transaction() as connection:
        connection.execute("SET TRANSACTION READ ONLY; CREATE TABLE written ()")
    assert "(SQLSTATE 25006)" in str(caught.value)
    assert type(caught.value) is DatabaseError
    with pytest.raises(DatabaseError, match="25006"), database.transaction(transaction_read_only="on") as connection:
        connection.execute("CREATE TABLE written ()")
    assert events(caplog) == []


# Idle limits


def test_connections_that_were_ended_while_idle_are_replaced_without_a_word(
    open_database: OpenDatabase,
    role: Callable[..., tuple[str, str]],
    admin: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, url = role()
    admin.execute(f"ALTER ROLE {name} SET idle_session_timeout = '200ms'".encode())
    database = open_database(url)
    lifeline = database.lifeline(10)

    for _ in range(3):
        fill_pool(database, 3)
        backend(lifeline)
        eventually(lambda: not admin.execute("SELECT FROM pg_stat_activity WHERE usename = %s", [name]).fetchall())
        assert database.query("SELECT 1", {}) == [(1,)]

    assert events(caplog) == []


def test_connections_that_a_proxy_closed_are_replaced_without_a_word(
    open_database: OpenDatabase, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(proxy.conninfo)
    lifeline = database.lifeline(10)

    for _ in range(3):
        fill_pool(database, 3)
        backend(lifeline)
        proxy.close_all()
        assert database.query("SELECT 1", {}) == [(1,)]
        backend(lifeline)
        write(database)

    assert events(caplog) == []


# Names and passwords


def test_a_name_that_moves_is_resolved_anew_for_each_connection(
    open_database: OpenDatabase,
    database_url: str,
    own_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Proxy(database_url) as old, Proxy(own_server.conninfo, "127.0.0.2", old.port) as new:
        answer = [old.host]
        infos = lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer[0], 0))]  # noqa: E731
        monkeypatch.setattr(socket, "getaddrinfo", infos)
        database = open_database(make_conninfo(new.conninfo, host="db.example"))
        answer[0] = new.host
        there = where(database)
        answer[0] = old.host
        new.close_all()
        own_server.stop()

        eventually(lambda: works(database))
        assert old.connections
        assert there != admin_directory(database_url)


def admin_directory(url: str) -> str:
    with psycopg.connect(url) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
    assert row is not None
    return str(row[0])


@pytest.fixture
def careful(own_server: EmbeddedServer) -> Iterator[Callable[[str], None]]:
    """Has the server ask the role `careful` for a password; sets it and ends the role's sessions."""
    with closing(psycopg.connect(own_server.conninfo, autocommit=True)) as admin:
        admin.execute("CREATE ROLE careful LOGIN PASSWORD 'old'")
        row = admin.execute("SHOW hba_file").fetchone()
        assert row is not None
        rules = Path(row[0])
        rules.write_text(f"local all careful scram-sha-256\n{rules.read_text()}")
        admin.execute("SELECT pg_reload_conf()")

        def asks() -> bool:
            try:
                psycopg.connect(own_server.conninfo, user="careful", password="").close()
            except psycopg.OperationalError:
                return True
            return False

        eventually(asks)  # the server reads its rules a little later

        def change(password: str) -> None:
            admin.execute(f"ALTER ROLE careful PASSWORD '{password}'".encode())
            admin.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'careful'")

        yield change


@pytest.mark.parametrize("kept_in", ["pgpass", "url_file", "credential"])
def test_a_password_that_is_changed_where_it_is_kept_is_used_for_the_next_connection(
    own_server: EmbeddedServer,
    careful: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_in: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = tmp_path / ("database-url" if kept_in == "credential" else "kept")
    address = make_conninfo(own_server.conninfo, user="careful")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)} if kept_in == "credential" else {}
    config = tmp_path / "config.toml"
    named = f"url_file = {str(kept)!r}" if kept_in == "url_file" else f"url = {address!r}"
    config.write_text(f"[database]\n{named}\n")
    if kept_in == "pgpass":
        monkeypatch.setenv("PGPASSFILE", str(kept))
    config.chmod(0o600)

    def hand_out(password: str) -> None:
        kept.write_text(
            f"*:*:*:careful:{password}\n" if kept_in == "pgpass" else make_conninfo(address, password=password)
        )
        kept.chmod(0o600)

    hand_out("old")
    with Database(load_settings(config, environ=environ).database) as database:
        assert works(database)

        careful("new")
        for _ in range(3):
            assert not works(database)
        assert 'password authentication failed for user "careful"' in database.trouble
        hand_out("new")
        assert works(database)

    assert events(caplog) == OUTAGE


def test_an_address_of_another_database_is_not_taken_over_while_the_process_runs(
    database_url: str, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    kept, config = tmp_path / "url", tmp_path / "config.toml"
    for file, text in ((kept, database_url), (config, "[database]\nurl_file = 'url'\n")):
        file.write_text(text)
        file.chmod(0o600)
    with Database(load_settings(config, environ={}).database) as database:
        before = where(database)
        for other in (make_conninfo(own_server.conninfo, password="x"), "no address", ""):
            kept.write_text(other)
            with database.session() as session:
                assert single(session, "SHOW data_directory") == (before,)


def test_the_failures_of_several_hosts_are_one_short_line(open_database: OpenDatabase) -> None:
    database = open_database("host=127.0.0.1,127.0.0.1 port=1,2 dbname=x target_session_attrs=read-write")

    with pytest.raises(DatabaseUnavailable) as caught, database.session():
        pass
    assert str(caught.value) == (
        'no connection to the database: connection to server at "127.0.0.1", port 1 failed: Connection refused; '
        'connection to server at "127.0.0.1", port 2 failed: Connection refused'
    )


# Runs


def test_the_transactions_of_a_run_bear_its_name(database: Database) -> None:
    name = "catfeeder-cron run 7 01234567"
    for given, expected in ((name, name), (None, "catfeeder-cron")):
        context = JobContext(
            database=database, tables=DatabaseTables(), timeout=timedelta(seconds=60), application_name=given
        )
        with context.transaction() as connection:
            assert single(connection, "SHOW application_name") == (expected,)
    assert database.query("SHOW application_name", {}) == [("catfeeder-cron",)]
