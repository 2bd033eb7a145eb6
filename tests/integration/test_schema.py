"""init-db: the daemon's own schema, Cat Feeder's tables, and the indexes that the jobs want."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.catalog import WantedIndex
from catfeeder_cron.database.schema.application import create_tables
from catfeeder_cron.database.schema.indexes import create_indexes
from catfeeder_cron.errors import SchemaProblem
from catfeeder_cron.jobs import built_in
from tests.support.waiting import eventually

OpenDatabase = Callable[..., Database]
Role = Callable[..., tuple[str, str]]
Connect = Callable[..., psycopg.Connection]

TABLES = DatabaseTables()
WANTED = [index for job in built_in().values() for index in job.wanted_indexes]
MADE = [(f"public.{table}", True) for table in ("Actions", "Actions", "ActiveOauths", "Connections", "Verification")]
ONE = [WantedIndex("connections", "expiration_date")]
INDEXES = """
    SELECT n.nspname || '.' || t.relname, i.indisvalid FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
    JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE c.relname LIKE 'catfeeder_cron%' ORDER BY 1"""


@pytest.fixture
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor() as threads:
        yield threads.submit


def versions(admin: psycopg.Connection) -> list[int]:
    query = "SELECT version FROM catfeeder_cron.schema_version ORDER BY version"
    return [row[0] for row in admin.execute(query)]


def relations(admin: psycopg.Connection) -> list[tuple[Any, ...]]:
    return admin.execute("""SELECT c.oid, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname !~ '^(pg_|information_schema)' ORDER BY 1""").fetchall()


def test_the_schema_is_created_once_and_the_second_time_there_is_nothing_to_do(
    admin: psycopg.Connection, database: Database
) -> None:
    first = list(schema.upgrade(database))

    assert first[0] == "created schema catfeeder_cron: 0001_schema_version.sql"
    assert versions(admin) == list(range(1, len(first) + 1))
    before = relations(admin)
    assert list(schema.upgrade(database)) == []
    schema.ensure(database)
    schema.require(database)
    assert relations(admin) == before


def test_a_dry_run_tells_the_same_and_changes_nothing(admin: psycopg.Connection, database: Database) -> None:
    planned = [
        *schema.upgrade(database, dry_run=True),
        *create_tables(database, DatabaseTables.model_validate({"schema": "elsewhere"}), dry_run=True),
    ]

    assert relations(admin) == []
    assert admin.execute("SELECT to_regnamespace('catfeeder_cron'), to_regnamespace('elsewhere')").fetchone() == (
        None,
        None,
    )
    done = [
        *schema.upgrade(database),
        *create_tables(database, DatabaseTables.model_validate({"schema": "elsewhere"})),
    ]
    assert [line.replace("would create", "created") for line in planned] == done


@pytest.mark.parametrize("what", [schema.upgrade, lambda database: create_tables(database, TABLES), schema.ensure])
def test_of_those_who_create_at_the_same_time_one_works_and_none_fails(
    admin: psycopg.Connection, open_database: OpenDatabase, what: Callable[[Database], Any]
) -> None:
    ready = threading.Barrier(4)

    def work(database: Database) -> list[str]:
        ready.wait()
        return list(what(database) or [])

    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(work, [open_database() for _ in range(4)]))

    if what is schema.ensure:
        assert len(versions(admin)) == len(set(versions(admin))) > 0
    else:
        assert sum(1 for lines in done if lines) == 1


def test_an_interrupted_upgrade_leaves_nothing_half_done(admin: psycopg.Connection, database: Database) -> None:
    steps = schema.upgrade(database)
    next(steps)
    assert isinstance(steps, Generator)
    steps.close()

    assert relations(admin) == []
    assert list(schema.upgrade(database)) != []


def test_a_role_that_may_not_create_the_schema_is_told_to_run_init_db(
    open_database: OpenDatabase, role: Role, database: Database
) -> None:
    _, url = role()
    other = open_database(url)

    with pytest.raises(
        SchemaProblem, match=r"is missing, .* run `catfeeder-cron init-db` as the database's owner"
    ) as told:
        schema.ensure(other)
    assert "`catfeeder-cron check`" not in str(told.value)
    with pytest.raises(SchemaProblem, match="init-db"):
        schema.require(other)
    list(schema.upgrade(database))
    schema.ensure(other)
    schema.require(other)


def test_an_older_schema_that_the_role_may_not_upgrade_is_told_with_its_version(
    admin: psycopg.Connection, open_database: OpenDatabase, role: Role, database: Database
) -> None:
    _, url = role()
    known = len(list(schema.upgrade(database)))
    admin.execute("DELETE FROM catfeeder_cron.schema_version WHERE version = %s", [known])

    with pytest.raises(SchemaProblem, match=f"at version {known - 1}, older than this program") as caught:
        schema.ensure(open_database(url))

    assert "\n" not in str(caught.value)


def test_the_next_version_is_served_and_one_further_on_is_refused(
    admin: psycopg.Connection, database: Database
) -> None:
    known = len(list(schema.upgrade(database)))

    admin.execute("INSERT INTO catfeeder_cron.schema_version (version) VALUES (%s)", [known + 1])
    schema.ensure(database)
    assert list(schema.upgrade(database)) == []

    admin.execute("INSERT INTO catfeeder_cron.schema_version (version) VALUES (%s)", [known + 2])
    told = f"has version {known + 2}, this program knows {known} .* install a newer catfeeder-cron"
    with pytest.raises(SchemaProblem, match=told):
        schema.ensure(database)
    for dry_run in (False, True):
        with pytest.raises(SchemaProblem, match=told):
            list(schema.upgrade(database, dry_run=dry_run))


def test_a_schema_that_was_created_for_the_role_is_used(
    admin: psycopg.Connection, open_database: OpenDatabase, role: Role
) -> None:
    """An administrator may hand out schemas without the right to create more of them."""
    name, url = role()
    admin.execute(f"CREATE SCHEMA catfeeder_cron AUTHORIZATION {name}; CREATE SCHEMA app AUTHORIZATION {name}".encode())
    database = open_database(url)

    schema.ensure(database)
    list(create_tables(database, DatabaseTables.model_validate({"schema": "app"})))

    assert len(versions(admin)) > 0


@pytest.mark.parametrize(
    "revoked", ["USAGE ON SCHEMA catfeeder_cron", "SELECT ON catfeeder_cron.schema_version"], ids=["schema", "table"]
)
def test_a_schema_that_the_role_may_not_read_is_told(
    admin: psycopg.Connection, open_database: OpenDatabase, role: Role, database: Database, revoked: str
) -> None:
    _, url = role()
    list(schema.upgrade(database))
    admin.execute(f"REVOKE {revoked} FROM PUBLIC".encode())

    with pytest.raises(SchemaProblem, match="this role may not read the schema catfeeder_cron"):
        schema.ensure(open_database(url))


def test_cat_feeders_tables_are_those_of_the_contract(admin: psycopg.Connection, database: Database) -> None:
    assert len(list(create_tables(database, TABLES))) == 9

    admin.execute("""
        INSERT INTO "Actions" (kind, due_at) VALUES ('webhook', now());
        INSERT INTO "Services" (name) VALUES ('a');
        INSERT INTO "Connections" (token, expiration_date) VALUES ('t', NULL);
        INSERT INTO "Verification" DEFAULT VALUES; INSERT INTO "Users" DEFAULT VALUES; INSERT INTO "Pet" DEFAULT VALUES;
        INSERT INTO "UserOauthConnection" (provider_name, client_id) VALUES ('p', 'c');
        INSERT INTO "ActiveOauths" (token) VALUES ('t');
        INSERT INTO "ActionLog" (action_id) VALUES (1)""")
    row = admin.execute('SELECT state, attempts, max_attempts, user_id FROM "Actions"').fetchone()
    assert row == ("pending", 0, 5, None)
    for statement in (
        "INSERT INTO \"Services\" (name) VALUES ('a')",
        "INSERT INTO \"Connections\" (token) VALUES ('t')",
        "INSERT INTO \"UserOauthConnection\" (provider_name) VALUES ('p')",
    ):
        with pytest.raises(psycopg.errors.UniqueViolation):
            admin.execute(statement.encode())
    with pytest.raises(psycopg.errors.CheckViolation):
        admin.execute("UPDATE \"Actions\" SET state = 'unheard of'")


def test_existing_tables_are_left_alone_and_missing_ones_come_under_their_configured_names(
    admin: psycopg.Connection, database: Database
) -> None:
    name = 'a%b {x} "y"'
    tables = DatabaseTables.model_validate({"schema": name, "connections": name, "pet": "%s"})
    table = sql.Identifier(name, "Verification")
    admin.execute(sql.SQL("CREATE SCHEMA {}; CREATE TABLE {} AS SELECT 1 AS mine").format(sql.Identifier(name), table))

    assert len(list(create_tables(database, tables))) == 8
    assert list(create_tables(database, tables)) == []

    assert admin.execute(sql.SQL("SELECT mine FROM {}").format(table)).fetchone() == (1,)
    assert admin.execute(sql.SQL("SELECT token FROM {}").format(sql.Identifier(name, name))).fetchall() == []


def test_the_wanted_indexes_are_created_once(admin: psycopg.Connection, database: Database) -> None:
    list(create_tables(database, TABLES))

    planned = list(create_indexes(database, TABLES, WANTED, dry_run=True))
    assert admin.execute(INDEXES).fetchall() == []
    done = list(create_indexes(database, TABLES, WANTED))

    assert [line.replace("would create", "created") for line in planned] == done
    assert 'created index on "public"."Connections" (expiration_date)' in done
    assert admin.execute(INDEXES).fetchall() == MADE
    assert list(create_indexes(database, TABLES, WANTED)) == []
    assert list(create_indexes(database, TABLES, WANTED, dry_run=True)) == []


def test_an_index_of_the_web_servers_own_is_enough(admin: psycopg.Connection, database: Database) -> None:
    list(create_tables(database, TABLES))
    admin.execute('CREATE INDEX mine ON "Connections" (expiration_date, id)')

    assert list(create_indexes(database, TABLES, ONE)) == []


def test_what_is_not_there_yet_and_not_needed_is_told_and_no_failure(
    admin: psycopg.Connection, database: Database
) -> None:
    admin.execute('CREATE TABLE "Connections" (id int)')

    for dry_run in (True, False):
        lines = list(create_indexes(database, TABLES, WANTED, dry_run=dry_run))
        assert len(lines) == len(WANTED)
        assert all("\n" not in line for line in lines)
    assert any('no index on "public"."Connections" (expiration_date): ' in line for line in lines)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_table_that_is_needed_and_missing_is_a_failure_after_the_others_were_indexed(
    admin: psycopg.Connection, database: Database, *, dry_run: bool
) -> None:
    admin.execute('CREATE TABLE "Verification" (expiration timestamptz)')
    lines = create_indexes(database, TABLES, WANTED, needed=["connections", "active_oauths"], dry_run=dry_run)
    told: list[str] = []

    with pytest.raises(SchemaProblem) as caught:
        told.extend(lines)

    problems = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in problems] == [
        'no index on "public"."Connections" (expiration_date)',
        'no index on "public"."ActiveOauths" (token_expiration)',
    ]
    assert all("init-db --with-app-tables" in line for line in problems)
    assert admin.execute(INDEXES).fetchall() == ([] if dry_run else [("public.Verification", True)])


def test_an_index_that_can_not_be_created_keeps_no_other_from_it(
    admin: psycopg.Connection, open_database: OpenDatabase, role: Role
) -> None:
    name, url = role()
    admin.execute("""
        CREATE TABLE "Connections" (expiration_date timestamptz);
        CREATE TABLE "Verification" (expiration timestamptz)""")
    admin.execute(f'ALTER TABLE "Verification" OWNER TO {name}; GRANT CREATE ON SCHEMA public TO {name}'.encode())

    with pytest.raises(SchemaProblem) as caught:
        list(create_indexes(open_database(url), TABLES, WANTED))

    assert str(caught.value) == (
        'no index on "public"."Connections" (expiration_date): must be owner of table Connections (SQLSTATE 42501); '
        "run `init-db` as the owner"
    )
    assert admin.execute(INDEXES).fetchall() == [("public.Verification", True)]


def test_names_of_any_kind_and_length_get_an_index_each(admin: psycopg.Connection, database: Database) -> None:
    names = ['a%b {x} "y"', "x" * 63, "🐈" * 15 + "1", "🐈" * 15 + "2"]
    for name in names:
        table = sql.Identifier(name)
        admin.execute(sql.SQL("CREATE TABLE {} (expiration_date timestamptz)").format(table))
        where = DatabaseTables.model_validate({"connections": name})
        assert len(list(create_indexes(database, where, ONE))) == 1
        assert list(create_indexes(database, where, ONE)) == []

    assert len(admin.execute(INDEXES).fetchall()) == len(names)


def test_partitioned_tables_are_indexed_leaf_by_leaf(admin: psycopg.Connection, database: Database) -> None:
    admin.execute("""
        CREATE SCHEMA archive;
        CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF "Connections" FOR VALUES FROM (0) TO (100) PARTITION BY HASH (id);
        CREATE TABLE low0 PARTITION OF low FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE archive.low0 PARTITION OF low FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE high PARTITION OF "Connections" DEFAULT;
        CREATE INDEX ON low0 (expiration_date)""")

    assert len(list(create_indexes(database, TABLES, ONE))) == 2

    assert admin.execute(INDEXES).fetchall() == [("archive.low0", True), ("public.high", True)]


def test_an_index_that_another_process_has_created_meanwhile_is_enough(
    admin: psycopg.Connection, open_database: OpenDatabase
) -> None:
    admin.execute("""
        CREATE TABLE "Connections" (id bigint, expiration_date timestamptz) PARTITION BY RANGE (id);
        CREATE TABLE a PARTITION OF "Connections" FOR VALUES FROM (0) TO (100);
        CREATE TABLE b PARTITION OF "Connections" DEFAULT""")
    lines = create_indexes(open_database(), TABLES, ONE)

    assert '"a"' in next(iter(lines))
    assert len(list(create_indexes(open_database(), TABLES, ONE))) == 1
    assert list(lines) == []
    assert admin.execute(INDEXES).fetchall() == [("public.a", True), ("public.b", True)]


def test_an_index_is_created_beside_transactions_that_write(
    admin: psycopg.Connection,
    connect: Connect,
    open_database: OpenDatabase,
    role: Role,
    in_background: Callable[..., Future[list[str]]],
) -> None:
    """With the role's own statement_timeout and lock_timeout, and longer than the configured statement_timeout."""
    name, url = role("SUPERUSER")
    admin.execute(
        f"ALTER ROLE {name} SET statement_timeout = '60 ms'; ALTER ROLE {name} SET lock_timeout = 30".encode()
    )
    database = open_database(url, statement_timeout=0.06)
    admin.execute('CREATE TABLE "Connections" (id int, expiration_date timestamptz)')
    other = connect(autocommit=False)
    other.execute('INSERT INTO "Connections" VALUES (1, now())')

    building = in_background(lambda: list(create_indexes(database, TABLES, ONE)))
    eventually(lambda: admin.execute("SELECT FROM pg_stat_progress_create_index WHERE phase ~ 'waiting'").rowcount)
    admin.execute('INSERT INTO "Connections" VALUES (2, now())')
    time.sleep(0.1)  # longer than any of the timeouts
    assert not building.done()
    other.commit()

    assert building.result() == ['created index on "public"."Connections" (expiration_date)']
    assert admin.execute(INDEXES).fetchall() == [("public.Connections", True)]


def test_an_invalid_index_left_by_an_interrupted_try_is_rebuilt(
    admin: psycopg.Connection,
    connect: Connect,
    database: Database,
    in_background: Callable[..., Future[list[str]]],
) -> None:
    admin.execute('CREATE TABLE "Connections" (id int, expiration_date timestamptz)')
    other = connect(autocommit=False)
    other.execute('INSERT INTO "Connections" VALUES (1, now())')
    building = in_background(lambda: list(create_indexes(database, TABLES, ONE)))
    eventually(lambda: admin.execute("SELECT FROM pg_stat_progress_create_index WHERE phase ~ 'waiting'").rowcount)
    assert admin.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_progress_create_index").fetchall() == [(True,)]
    assert building.exception() is not None
    other.commit()
    assert admin.execute(INDEXES).fetchall() == [("public.Connections", False)]

    assert len(list(create_indexes(database, TABLES, ONE, dry_run=True))) == 1
    assert len(list(create_indexes(database, TABLES, ONE))) == 1

    assert admin.execute(INDEXES).fetchall() == [("public.Connections", True)]


def test_an_index_that_another_process_is_building_is_left_to_it(
    admin: psycopg.Connection,
    connect: Connect,
    open_database: OpenDatabase,
    in_background: Callable[..., Future[list[str]]],
) -> None:
    admin.execute('CREATE TABLE "Connections" (id int, expiration_date timestamptz)')
    other = connect(autocommit=False)
    other.execute('INSERT INTO "Connections" VALUES (1, now())')
    first = in_background(lambda: list(create_indexes(open_database(), TABLES, ONE)))
    eventually(lambda: admin.execute("SELECT FROM pg_stat_progress_create_index WHERE phase ~ 'waiting'").rowcount)

    (line,) = create_indexes(open_database(), TABLES, ONE)

    assert "left to" in line
    other.commit()
    assert len(first.result()) == 1
    assert admin.execute(INDEXES).fetchall() == [("public.Connections", True)]


def test_several_that_create_the_indexes_at_the_same_time_do_not_deadlock(
    admin: psycopg.Connection, open_database: OpenDatabase
) -> None:
    list(create_tables(open_database(), TABLES))
    admin.execute('INSERT INTO "Connections" (token) SELECT n::text FROM generate_series(1, 20000) n')
    ready = threading.Barrier(3)

    def work(database: Database) -> list[str]:
        ready.wait()
        return list(create_indexes(database, TABLES, WANTED))

    with ThreadPoolExecutor(3) as threads:
        lines = [line for lines in threads.map(work, [open_database() for _ in range(3)]) for line in lines]

    assert sum(line.startswith("created ") for line in lines) == len(MADE)
    assert admin.execute(INDEXES).fetchall() == MADE
