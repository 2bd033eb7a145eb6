"""Databases for tests, each used by one test after the other: empty ones, and such as hold the tables from the start.

To create the tables and to drop them again costs 40 to 150 ms of CPU time, more than most tests do besides. So they
stay, and are only emptied, for as long as no test changes anything but rows; then the database is copied anew.
"""

import secrets
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from catfeeder_cron.config import DatabaseSettings, DatabaseTables
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables
from catfeeder_cron.database.schema.indexes import create_indexes
from catfeeder_cron.jobs import built_in

# A new database for each test would cost 25 ms and checkpoints to wait for, this 6 ms. DROP waits for the sessions that
# are closing.
_END_SESSIONS = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();"""
_DROP_EVERYTHING = """
    DO $$
    DECLARE schema text;
    BEGIN
        FOR schema IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
            EXECUTE format('DROP SCHEMA %I CASCADE', schema);
        END LOOP;
        EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
    END $$;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO PUBLIC"""

# A sequence, since what it counts stays where the statement is rolled back. The few rows that there are from the start
# are kept, in tables whose names nobody takes for the program's.
_WATCH = """
    CREATE SCHEMA watch;
    CREATE SEQUENCE watch.changes;
    CREATE FUNCTION watch.note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER
        AS $$ BEGIN PERFORM nextval('watch.changes'); END $$;
    CREATE TABLE watch.tables AS
        SELECT c.oid, c.oid::regclass::text AS name, NULL::text AS kept
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND n.nspname IN ('public', 'catfeeder_cron');
    UPDATE watch.tables SET kept = 'watch.kept_' || oid WHERE pg_relation_size(oid) > 0;
    DO $$
    DECLARE one record;
    BEGIN
        FOR one IN SELECT name, kept FROM watch.tables WHERE kept IS NOT NULL LOOP
            EXECUTE format('CREATE TABLE %s AS TABLE %s', one.kept, one.name);
        END LOOP;
    END $$;
    CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION watch.note();
    CREATE EVENT TRIGGER watch_drops ON sql_drop EXECUTE FUNCTION watch.note()"""

# Statistics would change the plans of the next test.
_IS_CHANGED = """
    SELECT (SELECT is_called FROM watch.changes)
        OR EXISTS (SELECT FROM pg_statistic WHERE starelid IN (SELECT oid FROM watch.tables))"""

# A table that has a page was written to, whatever is left in it.
_EMPTY_TABLES = """
    DO $$
    DECLARE written text; one record; differs boolean;
    BEGIN
        SELECT string_agg(name, ', ') INTO written
            FROM watch.tables WHERE kept IS NULL AND pg_relation_size(oid) > 0;
        IF written IS NOT NULL THEN
            EXECUTE format('TRUNCATE %s RESTART IDENTITY CASCADE', written);
        END IF;
        FOR one IN SELECT name, kept FROM watch.tables WHERE kept IS NOT NULL LOOP
            EXECUTE format('SELECT EXISTS (TABLE %1$s EXCEPT TABLE %2$s) OR EXISTS (TABLE %2$s EXCEPT TABLE %1$s)',
                           one.name, one.kept) INTO differs;
            IF differs THEN
                EXECUTE format('TRUNCATE %1$s; INSERT INTO %1$s OVERRIDING SYSTEM VALUE TABLE %2$s',
                               one.name, one.kept);
            END IF;
        END LOOP;
        EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
        PERFORM pg_stat_reset();
    END $$"""


def _tables(database: Database) -> Iterable[str]:
    return create_tables(database, DatabaseTables())


def _indexes(database: Database) -> Iterable[str]:
    wanted = [index for job in built_in().values() for index in job.wanted_indexes]
    return create_indexes(database, DatabaseTables(), wanted)


# The fixture that a test asks for when its database shall hold this from the start: what which `init-db` creates.
_STEPS: dict[str, tuple[Callable[[Database], Iterable[str]], ...]] = {
    "with_schema": (schema.upgrade,),
    "with_tables": (schema.upgrade, _tables),
    "with_indexes": (schema.upgrade, _tables, _indexes),
}


def contents_for(fixtures: Iterable[str]) -> str:
    """Return the name of what the database of a test with these fixtures holds from the start, "" for nothing."""
    return max((name for name in _STEPS if name in fixtures), key=[*_STEPS].index, default="")


class TestDatabase:
    """A database that one test after the other uses."""

    __test__ = False

    def __init__(self, server: str, contents: str) -> None:
        name = f"catfeeder_cron_test_{secrets.token_hex(4)}"
        self.url = make_conninfo(server, dbname=name)
        self._server = server
        self._steps = _STEPS.get(contents, ())
        self._name = name
        self._template = f"{name}_template" if self._steps else "template0"
        self._has_template = not self._steps
        self._is_prepared = False

    def prepare(self) -> None:
        """Create it with what it is to hold, unless it is there."""
        if not self._is_prepared:
            with _connect(self._server) as server:
                if not self._has_template:
                    self._create_template(server)
                _drop(server, self._name)
                _create(server, self._name, self._template)
            self._is_prepared = True

    def clear(self) -> None:
        """End all sessions and remove what a test has left there."""
        # A daemon that the test leaves to its fixtures to end may come back, and lock in another order.
        for last in (False, False, True):
            try:
                with _connect(self.url) as connection:
                    self._clear(connection)
            except psycopg.errors.DeadlockDetected:
                if last:
                    raise
            else:
                break

    def drop(self) -> None:
        """Drop it for good."""
        with _connect(self._server) as server:
            _drop(server, self._name)
            if self._steps:
                _drop(server, self._template)

    def _create_template(self, server: "psycopg.Connection[Any]") -> None:
        """Create what it is a copy of: a copy costs a quarter of what its tables cost."""
        _create(server, self._template, "template0")
        url = make_conninfo(self._server, dbname=self._template)
        with Database(DatabaseSettings.model_validate({"url": url})) as database:
            list(chain.from_iterable(step(database) for step in self._steps))
        with _connect(url) as connection:
            connection.execute(_WATCH)
        self._has_template = True

    def _clear(self, connection: "psycopg.Connection[Any]") -> None:
        connection.execute(_END_SESSIONS)
        if not self._steps:
            connection.execute(_DROP_EVERYTHING)
        elif self._is_changed(connection):
            self._is_prepared = False
        else:
            connection.execute(_EMPTY_TABLES)

    def _is_changed(self, connection: "psycopg.Connection[Any]") -> bool:
        try:
            return connection.execute(_IS_CHANGED).fetchone() != (False,)
        except psycopg.errors.UndefinedTable:
            return True  # the test has dropped all that there was


def _connect(url: str) -> "psycopg.Connection[Any]":
    return psycopg.connect(url, autocommit=True)


def _create(server: "psycopg.Connection[Any]", name: str, template: str) -> None:
    server.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))


def _drop(server: "psycopg.Connection[Any]", name: str) -> None:
    server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
