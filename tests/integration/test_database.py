"""The pool: what a transaction promises, and what is told when the server refuses, goes away and comes back."""

import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Connection, Database, single
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.errors import (
    CatfeederCronError,
    ConfigurationError,
    ConstraintViolation,
    DatabaseError,
    DatabaseUnavailable,
    LockTimeout,
    PermissionDenied,
    SchemaProblem,
    StatementTimeout,
    UndefinedObject,
)
from tests.support.waiting import eventually

OpenDatabase = Callable[..., Database]
StopServer = Callable[[str], Callable[[], None]]

NOBODY_THERE = "postgresql://cat:the-secret@127.0.0.1:1/catfeeder"
OURS = "datname = current_database() AND application_name = 'catfeeder-cron'"
# As a connect_timeout: who waited for it would be ended by the test's own time.
NEVER = 3600


def probe(database: Database) -> None:
    """Connect once outside the pool."""
    with database.session():
        pass


def show(connection: Connection, setting: str) -> Any:
    return single(connection, "SELECT current_setting(%s)", [setting])[0]


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage().split()[0] for r in caplog.records if r.name == "catfeeder_cron.database"]


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "catfeeder_cron")


def the_one_line(database: Database) -> str:
    with pytest.raises(CatfeederCronError) as caught, database.transaction():
        pass
    told = "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    assert "secret" not in told
    return str(caught.value)


@pytest.fixture
def odd_role(role: Callable[..., tuple[str, str]], admin: psycopg.Connection) -> str:
    """The address of a role whose own settings differ from what the program needs."""
    name, url = role()
    for setting in (
        "timezone = 'Asia/Tokyo'",
        "statement_timeout = '123 s'",
        "default_transaction_isolation = 'serializable'",
        "jit = on",
    ):
        admin.execute(f"ALTER ROLE {name} SET {setting}".encode())
    return url


def test_a_transaction_has_its_settings_whatever_the_roles_are(open_database: OpenDatabase, odd_role: str) -> None:
    database = open_database(odd_role, statement_timeout=7)

    with database.transaction() as connection:
        assert show(connection, "timezone") == "UTC"
        assert show(connection, "transaction_isolation") == "read committed"
        assert show(connection, "statement_timeout") == "7s"
    with database.transaction(timeout=timedelta(seconds=9), lock_timeout="1s", enable_seqscan="off") as connection:
        assert show(connection, "statement_timeout") == "9s"
        assert show(connection, "lock_timeout") == "1s"
        assert show(connection, "enable_seqscan") == "off"
    with pytest.raises(StatementTimeout), database.transaction(timeout=timedelta(0)) as connection:
        connection.execute("SELECT pg_sleep(10)")


def test_nothing_is_left_in_a_session_for_the_next_client_of_a_pooler(
    open_database: OpenDatabase, odd_role: str
) -> None:
    """As PgBouncer's transaction mode wants it: no startup option, no setting, no prepared statement, no lock stays."""
    database = open_database(odd_role, pool_max_size=1)
    for number in range(12):
        with database.transaction(lock_timeout="1s") as connection:
            connection.execute("SELECT %s::int, pg_advisory_xact_lock(1)", [number])
    database.query("SELECT %(n)s::int", {"n": 1})

    assert "options" not in connection.info.get_parameters()
    settings = "SELECT name, setting, source FROM pg_settings WHERE source = 'session'"
    assert connection.execute(settings).fetchall() == []
    assert show(connection, "timezone") == "Asia/Tokyo"
    assert show(connection, "statement_timeout") == "123s"
    assert show(connection, "lock_timeout") == "0"
    assert connection.execute("SELECT name FROM pg_prepared_statements").fetchall() == []
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    assert single(connection, locks) == (0,)


def test_the_program_is_named_to_the_server_unless_the_address_names_it_otherwise(
    open_database: OpenDatabase, database_url: str
) -> None:
    with open_database().transaction() as connection:
        assert show(connection, "application_name") == "catfeeder-cron"
    with open_database(make_conninfo(database_url, application_name="mine")).transaction() as connection:
        assert show(connection, "application_name") == "mine"


def test_a_transaction_is_committed_or_rolled_back_as_a_whole(admin: psycopg.Connection, database: Database) -> None:
    admin.execute("CREATE TABLE cats (name text)")

    with database.transaction() as connection:
        connection.execute("INSERT INTO cats VALUES ('Tom')")
    with suppress(ZeroDivisionError), database.transaction() as connection:
        connection.execute("INSERT INTO cats VALUES ('Sylvester')")
        raise ZeroDivisionError
    with database.transaction() as connection:
        connection.execute("INSERT INTO cats VALUES ('Garfield')")
        with suppress(psycopg.errors.DivisionByZero), connection.transaction():
            connection.execute("INSERT INTO cats VALUES ('Azrael')")
            with connection.transaction():
                connection.execute("INSERT INTO cats VALUES ('Felix')")
            connection.execute("SELECT 1 / 0")

    assert admin.execute("SELECT name FROM cats").fetchall() == [("Tom",), ("Garfield",)]


def test_a_failure_that_was_swallowed_is_no_success(admin: psycopg.Connection, database: Database) -> None:
    """PostgreSQL answers COMMIT of a failed transaction with ROLLBACK, which is no error to it."""
    admin.execute("CREATE TABLE cats (name text)")

    def swallow() -> None:
        with database.transaction() as connection:
            connection.execute("INSERT INTO cats VALUES ('Tom')")
            with suppress(psycopg.errors.DivisionByZero):
                connection.execute("SELECT 1 / 0")

    with pytest.raises(DatabaseError, match="nothing was committed"):
        swallow()

    assert admin.execute("SELECT count(*) FROM cats").fetchone() == (0,)
    with database.transaction() as connection:
        assert single(connection, "SELECT 1") == (1,)


def test_one_statement_alone_is_committed_and_tells_what_it_did(admin: psycopg.Connection, database: Database) -> None:
    admin.execute("CREATE TABLE cats (name text)")

    assert database.execute("INSERT INTO cats VALUES (%(name)s), ('b')", {"name": "a"}) == 2
    assert database.query("SELECT name FROM cats ORDER BY name", {}) == [("a",), ("b",)]
    with pytest.raises(SchemaProblem):
        database.query("SELECT nothing FROM cats", {})


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("SELECT pg_sleep(10)", StatementTimeout),
        ("INSERT INTO cats VALUES (1), (1)", ConstraintViolation),
        ("INSERT INTO cats VALUES (2)", ConstraintViolation),
        ("LOCK TABLE locked NOWAIT", LockTimeout),
        ("SELECT * FROM dogs", UndefinedObject),
        ("SELECT age FROM cats", UndefinedObject),
        ("SELECT nothing.cats()", UndefinedObject),
        ("SELECT FROM cats WHERE id < now()", UndefinedObject),
        ("UPDATE cats SET id = now()", UndefinedObject),
        ("SELECT 1 / 0", DatabaseError),
        ("SELEKT", DatabaseError),
    ],
)
def test_psycopgs_errors_are_told_in_our_terms(
    admin: psycopg.Connection,
    connect: Callable[..., psycopg.Connection],
    database: Database,
    statement: str,
    error: type[DatabaseError],
) -> None:
    admin.execute("CREATE TABLE cats (id int CONSTRAINT one UNIQUE DEFERRABLE INITIALLY DEFERRED CHECK (id < 2))")
    admin.execute("CREATE TABLE locked ()")
    connect(autocommit=False).execute("LOCK TABLE locked")

    with (
        pytest.raises(DatabaseError) as caught,
        database.transaction(timeout=timedelta(milliseconds=50)) as connection,
    ):
        connection.execute(statement.encode())

    assert type(caught.value) is error
    assert "(SQLSTATE " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_role_may_not_do_is_told_with_the_command_that_says_more(
    admin: psycopg.Connection, open_database: OpenDatabase, role: Callable[..., tuple[str, str]]
) -> None:
    admin.execute("CREATE TABLE cats ()")
    _, url = role()

    with pytest.raises(PermissionDenied) as caught:
        open_database(url).query("SELECT FROM cats", {})

    assert caught.value.found == "permission denied for table cats (SQLSTATE 42501)"
    assert str(caught.value) == f"{caught.value.found}; `catfeeder-cron check` says what this role lacks"


def test_more_threads_than_connections_wait_for_each_other(open_database: OpenDatabase) -> None:
    database, busy, most = open_database(pool_max_size=2), [], []

    def work() -> None:
        with database.transaction() as connection:
            busy.append(1)
            most.append(len(busy))
            connection.execute("SELECT pg_sleep(0.01)")
            busy.pop()

    with ThreadPoolExecutor(10) as threads:
        for done in [threads.submit(work) for _ in range(20)]:
            done.result()
    assert max(most) <= 2


def test_a_pool_that_is_used_up_says_so_and_is_no_outage(
    open_database: OpenDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(pool_max_size=2, connect_timeout=1)

    with database.transaction(), database.transaction():
        line = the_one_line(database)

    assert line == "all 2 database connections stayed in use for 1 s; raise database.pool_max_size"
    assert "database_unreachable" not in events(caplog)
    with database.transaction():
        pass


def test_a_database_is_opened_by_its_first_use_and_closed_for_good(
    admin: psycopg.Connection, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def backends() -> int:
        query = "SELECT count(*) FROM pg_stat_activity WHERE " + OURS
        row = admin.execute(query).fetchone()
        assert row is not None
        return int(row[0])

    assert backends() == 0
    with database.transaction() as connection:
        assert single(connection, "SELECT 1") == (1,)
    assert backends() > 0
    database.close()
    database.close()

    for late in (lambda: fill_pool(database, 1), lambda: database.query("SELECT 1", {}), lambda: probe(database)):
        with pytest.raises(DatabaseUnavailable, match="has closed its connections"):
            late()
    assert (events(caplog), database.trouble) == ([], ""), "it is no outage"
    eventually(lambda: not backends())


def test_who_waits_for_a_connection_when_the_database_is_closed_is_told_so(
    open_database: OpenDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(pool_max_size=1)
    with ThreadPoolExecutor(1) as thread, database.transaction():
        waits = thread.submit(fill_pool, database, 1)
        eventually(lambda: database.pool_use["waiting"])
        database.close()

        with pytest.raises(DatabaseUnavailable, match="has closed its connections"):
            waits.result()
    assert events(caplog) == []


def test_closing_lets_a_transaction_end(database: Database, admin: psycopg.Connection) -> None:
    admin.execute("CREATE TABLE cats ()")

    with database.transaction() as connection:
        database.close()
        connection.execute("INSERT INTO cats DEFAULT VALUES")

    assert admin.execute("SELECT count(*) FROM cats").fetchone() == (1,)


@pytest.mark.usefixtures("embedded_alone")
def test_an_embedded_server_is_started_by_the_first_use_and_stopped_by_closing(tmp_path_factory: Any) -> None:
    folder = Path(tmp_path_factory.mktemp("e"))
    folder.chmod(0o755)
    settings = DatabaseSettings.model_validate({"url": f"embedded:{folder}/db"})

    for number in range(2):
        with Database(settings) as database, database.transaction() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS starts (number int)")
            connection.execute("INSERT INTO starts VALUES (%s)", [number])
            address = connection.info.dsn
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(address)
    with Database(settings) as database, database.transaction() as connection:
        assert connection.execute("SELECT number FROM starts").fetchall() == [(0,), (1,)]


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_restart_of_the_server_is_not_noticed_by_the_next_transactions(
    open_database: OpenDatabase,
    mortal_server: EmbeddedServer,
    stop_server: StopServer,
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = open_database(mortal_server.conninfo, pool_max_size=3)
    fill_pool(database, 3)
    stop_server(how)()

    for _ in range(2):
        fill_pool(database, 3)

    assert "database_unreachable" not in events(caplog)


def fill_pool(database: Database, connections: int) -> None:
    with ExitStack() as stack:
        for _ in range(connections):
            connection = stack.enter_context(database.transaction())
            assert single(connection, "SELECT 1") == (1,)


def test_sessions_that_an_administrator_ended_are_replaced(admin: psycopg.Connection, database: Database) -> None:
    fill_pool(database, 4)

    for _ in range(3):
        ended = admin.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}".encode()
        ).fetchall()
        assert ended
        fill_pool(database, 4)


def test_an_outage_is_logged_when_it_is_met_and_when_it_is_over_however_many_meet_it(
    open_database: OpenDatabase,
    mortal_server: EmbeddedServer,
    stop_server: StopServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = open_database(mortal_server.conninfo, connect_timeout=NEVER)
    fill_pool(database, 2)
    start = stop_server("fast")

    def work() -> bool:
        try:
            fill_pool(database, 1)
        except DatabaseUnavailable:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert not any(threads.map(lambda _: work(), range(12)))
        start()
        assert all(threads.map(lambda _: work(), range(12)))

    assert events(caplog) == ["database_unreachable", "database_reachable_again"]


def test_the_end_of_an_outage_is_told_even_if_the_first_transaction_fails_for_another_reason(
    open_database: OpenDatabase,
    mortal_server: EmbeddedServer,
    stop_server: StopServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = open_database(mortal_server.conninfo)
    start = stop_server("fast")
    the_one_line(database)
    start()

    with pytest.raises(DatabaseError), database.transaction() as connection:
        connection.execute("SELECT 1 / 0")

    assert events(caplog) == ["database_unreachable", "database_reachable_again"]


def test_a_connection_that_breaks_in_the_middle_is_an_outage(admin: psycopg.Connection, database: Database) -> None:
    def lose(*statements: LiteralString) -> None:
        with database.transaction() as connection:
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
            for statement in statements:
                connection.execute(statement)

    with pytest.raises(DatabaseUnavailable):
        lose("SELECT 1")
    with pytest.raises(DatabaseUnavailable):
        lose()  # the commit is the first to notice
    fill_pool(database, 1)


def test_a_server_that_is_not_there_is_named_at_once(open_database: OpenDatabase) -> None:
    database = open_database(NOBODY_THERE, connect_timeout=NEVER)

    for _ in range(2):
        line = the_one_line(database)
        assert 'connection to server at "127.0.0.1", port 1 failed: Connection refused' in line


def test_every_host_of_an_address_is_named(open_database: OpenDatabase, tmp_path: Path) -> None:
    line = the_one_line(open_database(f"host={tmp_path},127.0.0.1 port=1,2 dbname=x"))

    assert f"{tmp_path}/.s.PGSQL.1" in line
    assert "port 2" in line


def test_a_server_that_says_nothing_is_given_up_after_connect_timeout(open_database: OpenDatabase) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        line = the_one_line(open_database(f"postgresql://cat@127.0.0.1:{port}/x", connect_timeout=2))

    assert "timeout" in line


@pytest.fixture
def with_password(mortal_server: EmbeddedServer) -> Iterator[str]:
    """The address of a role that needs a password, with the wrong one."""
    with psycopg.connect(mortal_server.conninfo, autocommit=True) as admin:
        admin.execute("CREATE ROLE careful LOGIN PASSWORD 'right'")
        row = admin.execute("SHOW hba_file").fetchone()
        assert row is not None
        rules = Path(row[0])
        before = rules.read_text()
        rules.write_text(f"local all careful scram-sha-256\n{before}")
        admin.execute("SELECT pg_reload_conf()")
        yield make_conninfo(mortal_server.conninfo, user="careful", password="the-secret")
        rules.write_text(before)
        admin.execute("SELECT pg_reload_conf()")
        admin.execute("DROP ROLE careful")


def test_a_wrong_password_is_told_without_it(open_database: OpenDatabase, with_password: str) -> None:
    database = open_database(with_password)
    # The server reads its rules again a little later.
    eventually(lambda: 'password authentication failed for user "careful"' in the_one_line(database))


def test_a_database_that_does_not_exist_is_named(open_database: OpenDatabase, database_url: str) -> None:
    assert 'database "nirvana" does not exist' in the_one_line(
        open_database(make_conninfo(database_url, dbname="nirvana"))
    )


def test_a_server_without_a_free_connection_is_unavailable_for_now_and_that_is_told_once(
    open_database: OpenDatabase,
    role: Callable[..., tuple[str, str]],
    connect: Callable[..., psycopg.Connection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, url = role("CONNECTION LIMIT 1")
    other, database = connect(url), open_database(url, connect_timeout=NEVER)

    for _ in range(3):
        assert f'too many connections for role "{name}"' in the_one_line(database)

    other.close()
    eventually(lambda: works(database))
    assert events(caplog) == ["database_unreachable", "database_reachable_again"]


def works(database: Database) -> bool:
    try:
        fill_pool(database, 1)
    except DatabaseUnavailable:
        return False
    return True


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://cat:se/secret@localhost/db",
        "postgresql://cat:se@secret@localhost/db",
        "postgresql://cat:the secret@localhost/db",
        "postgresql://cat:secret%zz@localhost/db",
        "postgresql://cat:secret@[::1/db",
        "postgresql://cat:secret@localhost/db?no_such_option=1",
        "host=localhost password=the secret",
        "host=localhost password='secret",
    ],
)
def test_an_unusable_address_is_refused_without_quoting_it(open_database: OpenDatabase, address: str) -> None:
    database = open_database(address)

    with pytest.raises(ConfigurationError), database.session():
        pass
    assert "the database address" in the_one_line(database)


def test_a_session_of_its_own_is_outside_any_transaction(database: Database) -> None:
    with database.session() as connection:
        assert show(connection, "application_name") == "catfeeder-cron"
        connection.execute("VACUUM pg_proc")
    with pytest.raises(SchemaProblem), database.session() as connection:
        connection.execute("SELECT * FROM nothing")


def test_one_database_serves_many_threads_from_its_first_use_on(database: Database) -> None:
    ready = threading.Barrier(8)

    def work(_: int) -> None:
        ready.wait()
        fill_pool(database, 1)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
