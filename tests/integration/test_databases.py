"""The databases that tests share: whatever a test has done to one, the next finds it as it was in the beginning."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from tests.support.databases import TestDatabase

NOT_OURS = "^(pg_|information_schema|watch)"
FACTS = """
    SELECT 'column', c.oid::regclass::text,
           jsonb_build_array(attname, atttypid::regtype, c.relkind = 'r' AND c.reltuples >= 0, c.relacl::text)
    FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid AND attnum > 0
    WHERE relnamespace::regnamespace::text !~ %(not_ours)s
    UNION ALL SELECT 'function', oid::regprocedure::text, to_jsonb(prosrc)
        FROM pg_proc WHERE pronamespace::regnamespace::text !~ %(not_ours)s
    UNION ALL SELECT 'sequence', sequencename, to_jsonb(last_value) FROM pg_sequences WHERE schemaname <> 'watch'
    UNION ALL SELECT 'setting', datname, to_jsonb(setconfig)
        FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase WHERE datname = current_database()
    ORDER BY 1, 2, 3"""
TABLES = """
    SELECT oid, oid::regclass::text FROM pg_class
    WHERE relkind = 'r' AND relnamespace::regnamespace::text = ANY (ARRAY['public', 'catfeeder_cron']) ORDER BY 2"""


@pytest.fixture(params=["", "with_schema", "with_tables"])
def shared(request: pytest.FixtureRequest, _open_database: Callable[[str], TestDatabase]) -> TestDatabase:
    """One of this session's databases, which no other test uses meanwhile."""
    return _open_database(request.param)


def contents(database: TestDatabase) -> list[Any]:
    """What a test could see, but for times and names that are made anew with the tables."""
    with psycopg.connect(database.url) as connection:
        facts: list[Any] = connection.execute(FACTS, {"not_ours": NOT_OURS}).fetchall()
        for _, table in connection.execute(TABLES).fetchall():
            for (row,) in connection.execute(f"SELECT to_jsonb(t) FROM {table} t".encode()).fetchall():
                facts.append((table, {name: value for name, value in row.items() if isinstance(value, int)}))
    return facts


@pytest.mark.parametrize(
    "deed",
    [
        "SELECT 1",
        """INSERT INTO "Connections" (token) SELECT 'token-' || n FROM generate_series(1, 9) n""",
        "INSERT INTO catfeeder_cron.schedule VALUES ('job', 'every 1s', now())",
        "UPDATE catfeeder_cron.schema_version SET version = version + 1",
        "DELETE FROM catfeeder_cron.schema_version",
        """ALTER TABLE "Connections" DROP token""",
        "DROP SCHEMA catfeeder_cron CASCADE",
        "CREATE TABLE public.mine (id serial)",
        "CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "GRANT SELECT ON catfeeder_cron.schedule TO PUBLIC",
        "ANALYZE",
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET work_mem = ''1MB''', current_database()); END $$",
        "DO $$ BEGIN CREATE TABLE public.mine (); RAISE 'no'; END $$",
    ],
)
def test_the_next_test_finds_what_the_first_has_found(shared: TestDatabase, deed: str) -> None:
    shared.prepare()
    first = contents(shared)
    with psycopg.connect(shared.url, autocommit=True) as connection, suppress(psycopg.Error):
        connection.execute(deed.encode())

    shared.clear()
    shared.prepare()

    assert contents(shared) == first


@pytest.mark.parametrize("shared", ["with_tables"], indirect=True)
def test_the_tables_stay_where_only_rows_were_changed(shared: TestDatabase) -> None:
    shared.prepare()
    with psycopg.connect(shared.url) as connection:
        before = connection.execute(TABLES).fetchall()
        connection.execute("""INSERT INTO "Connections" (token) VALUES ('token')""")

    shared.clear()

    with psycopg.connect(shared.url) as connection:
        assert connection.execute(TABLES).fetchall() == before
        assert connection.execute("""SELECT count(*) FROM "Connections" """).fetchone() == (0,)
