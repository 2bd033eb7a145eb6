"""A table "Connections" like that of a busy Cat Feeder: built once in every size, and copied for every round."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.embedded import EmbeddedServer
from catfeeder_cron.database.schema.application import create_tables
from catfeeder_cron.database.schema.indexes import create_indexes
from catfeeder_cron.job import JobContext
from catfeeder_cron.jobs import clean_tokens
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.executor import run_job

# Expiries lie evenly this far before and behind the moment of building, in random order over the table. So it is
# `keep_expired_for` that says which share of the rows is to go, and one table serves every share.
SPREAD = timedelta(days=100)

# Tokens look like those of secrets.token_urlsafe().
_FILL = """
    INSERT INTO "Connections" (token, user_id, expiration_date)
    SELECT rtrim(translate(encode(sha256(n::text::bytea), 'base64'), '+/', '-_'), '='), n % 20000,
           now() + (2 * random() - 1) * {spread}::interval
    FROM generate_series(1, {rows}) n"""

# Filling bare tables and adding the keys afterwards takes a fifth of the time and gives the same.
_DROP_KEYS = 'ALTER TABLE "Connections" DROP CONSTRAINT "Connections_token_key", DROP CONSTRAINT "Connections_pkey"'
_ADD_KEYS = 'ALTER TABLE "Connections" ADD PRIMARY KEY (id), ADD UNIQUE (token)'


class Sessions:
    """The tables on one server."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server
        self._built: set[str] = set()
        self._numbers = itertools.count(1)

    @contextmanager
    def copy(self, rows: int, *, indexed: bool) -> Iterator[str]:
        """Yield the address of a database of the caller's own, with a table of this many rows."""
        name = f"round_{next(self._numbers)}"
        self._copy(self._original(rows, indexed=indexed), name)
        url = self._url(name)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
        yield url
        self._administer("DROP DATABASE {} WITH (FORCE)", name)

    def _original(self, rows: int, *, indexed: bool) -> str:
        name = f"sessions_{rows}{'_indexed' if indexed else ''}"
        if name not in self._built:
            if indexed:
                self._copy(self._original(rows, indexed=False), name)
                with _open(self._url(name)) as database:
                    list(create_indexes(database, _settings(self._url(name)).tables, clean_tokens.JOB.wanted_indexes))
            else:
                self._administer("CREATE DATABASE {}", name)
                _fill(self._url(name), rows)
            self._built.add(name)
        return name

    def _copy(self, original: str, name: str) -> None:
        self._administer("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY", name, original)

    def _administer(self, statement: str, *names: str) -> None:
        with psycopg.connect(self._server.conninfo, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _url(self, name: str) -> str:
        return make_conninfo(self._server.conninfo, dbname=name)


def age(share: float) -> timedelta:
    """How long ago the oldest `share` of all rows had already expired."""
    return SPREAD - 2 * share * SPREAD


def run(url: str, keep_expired_for: timedelta) -> JobReport:
    """Run clean-tokens with its default settings in this process, on a connection that is already open."""
    settings = clean_tokens.JOB.settings.model_validate({"keep_expired_for": keep_expired_for})
    with _open(url) as database:
        with database.transaction():
            pass
        context = JobContext(database=database, tables=_settings(url).tables, timeout=settings.timeout)
        report = run_job(clean_tokens.JOB, context, settings)
    assert report.outcome == "succeeded", report
    return report


def _fill(url: str, rows: int) -> None:
    with _open(url) as database:
        list(schema.upgrade(database))
        list(create_tables(database, _settings(url).tables))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_DROP_KEYS)
        connection.execute(sql.SQL(_FILL).format(rows=rows, spread=SPREAD))
        connection.execute(_ADD_KEYS)
        connection.execute("VACUUM ANALYZE")


def _open(url: str) -> Database:
    return Database(_settings(url))


def _settings(url: str) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"url": url, "statement_timeout": 600})
