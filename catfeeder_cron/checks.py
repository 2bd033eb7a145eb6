"""What stands in the way of the configured jobs: each finding with its remedy."""

import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from catfeeder_cron import catalog, schema
from catfeeder_cron.config import CustomJobSettings, Settings
from catfeeder_cron.custom_jobs import find_callable
from catfeeder_cron.database import Connection, Database, single
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError, DatabaseError, SchemaProblem
from catfeeder_cron.job import Job, TableUse
from catfeeder_cron.jobs import built_in

Level = Literal["ok", "warning", "error"]

_OLDEST_SERVER = 140000
_MOST_CLOCK_DIFFERENCE_SECONDS = 2

_LEDGER_PRIVILEGES = """
    SELECT format('%I.%I', schemaname, tablename) FROM pg_tables
    WHERE schemaname = 'catfeeder_cron' AND tablename <> 'schema_version'
      AND NOT (has_table_privilege(format('%I.%I', schemaname, tablename), 'SELECT')
               AND has_table_privilege(format('%I.%I', schemaname, tablename), 'INSERT')
               AND has_table_privilege(format('%I.%I', schemaname, tablename), 'UPDATE')
               AND has_table_privilege(format('%I.%I', schemaname, tablename), 'DELETE'))
    ORDER BY 1"""


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    message: str

    def as_json(self) -> dict[str, str]:
        return {"level": self.level, "subject": self.subject, "message": self.message}


def check(settings: Settings, database: Database) -> Iterator[Finding]:
    """Yield a finding for everything that the enabled jobs rely on. Raises nothing that an operator can cause."""
    yield Finding("ok", "configuration", str(settings.path))
    yield from _url_file(settings)
    yield from _callables(settings)
    try:
        with database.transaction() as connection:
            yield from _server(connection)
    except (DatabaseError, ConfigurationError) as error:
        yield Finding("error", "database", str(error))
        return
    yield from _schema(database)
    jobs = built_in()
    for job_id, job_settings in settings.jobs.items():
        if job_settings.enabled and job_id in jobs:
            yield from _job(database, settings, jobs[job_id])


def _url_file(settings: Settings) -> Iterator[Finding]:
    if settings.database.url_file is None:
        return
    path = settings.path.parent / settings.database.url_file
    try:
        mode = path.stat().st_mode
    except OSError as error:
        # Under systemd the service gets a credential instead.
        yield Finding("ok", "database.url_file", f"{path} can't be read by this user ({error.strerror})")
        return
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Finding("warning", "database.url_file", f"{path} can be read by others; chmod 600 {path}")
    else:
        yield Finding("ok", "database.url_file", str(path))


def _callables(settings: Settings) -> Iterator[Finding]:
    for job_id, job in settings.jobs.items():
        if isinstance(job, CustomJobSettings) and job.call is not None:
            try:
                find_callable(job.call)
            except ConfigurationError as error:
                yield Finding("error", job_id, f"{error}; install its package where catfeeder-cron is installed")
            else:
                yield Finding("ok", job_id, f"{job.call} can be imported")


def _server(connection: Connection) -> Iterator[Finding]:
    asked = time.time()
    version, name, clock = single(
        connection,
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'), clock_timestamp()",
    )
    yield Finding("ok", "database", f"PostgreSQL {name}, as {connection.info.user} on {connection.info.dbname}")
    if version < _OLDEST_SERVER:
        yield Finding("error", "database", f"PostgreSQL {name} is too old; 14 or newer is needed")
    here = datetime.fromtimestamp((asked + time.time()) / 2, UTC)
    difference = abs((clock - here).total_seconds())
    if difference > _MOST_CLOCK_DIFFERENCE_SECONDS:
        yield Finding("warning", "clock", f"this machine and the server differ by {difference:.1f} s; run NTP on both")
    else:
        yield Finding("ok", "clock", f"within {difference:.2f} s of the server's")


def _schema(database: Database) -> Iterator[Finding]:
    try:
        with database.transaction() as connection:
            installed = schema.installed_version(connection)
            lacking = [name for (name,) in connection.execute(_LEDGER_PRIVILEGES)]
            (may_create,) = single(connection, "SELECT has_database_privilege(current_database(), 'CREATE')")
        schema.refuse_unknown(installed)
    except DatabaseError as error:
        yield Finding("error", "schema", str(error))
        return
    if installed == 0:
        level: Level = "warning" if may_create else "error"
        yield Finding(level, "schema", "catfeeder_cron is missing; run `catfeeder-cron init-db`")
    elif installed < schema.known_version():
        yield Finding("warning", "schema", f"version {installed} is older than this program; run `init-db`")
    else:
        yield Finding("ok", "schema", f"catfeeder_cron, version {installed}")
    if lacking:
        yield Finding(
            "error",
            "schema",
            f"no right to write {', '.join(lacking)}; its owner can say: GRANT SELECT, INSERT, UPDATE, DELETE "
            "ON ALL TABLES IN SCHEMA catfeeder_cron TO this role",
        )


def _job(database: Database, settings: Settings, job: Job[Any]) -> Iterator[Finding]:
    faults = 0
    for use in job.tables:
        try:
            with database.transaction() as connection:
                _require(connection, settings, use)
        except SchemaProblem as error:
            faults += 1
            yield Finding("warning" if use.optional else "error", job.id, str(error))
        except CatfeederCronError as error:
            faults += 1
            yield Finding("error", job.id, str(error))
    if not faults:
        yield Finding("ok", job.id, "tables, columns and privileges are there")
        yield from _indexes(database, settings, job)


def _require(connection: Connection, settings: Settings, use: TableUse) -> None:
    """Raise SchemaProblem unless the table is as the job needs it."""
    tables = settings.database.tables
    name = getattr(tables, use.table)
    columns = (*use.columns, *use.times)
    oid, _ = catalog.find_table(connection, tables.schema_, name, columns[0])
    types = catalog.column_types(connection, oid)
    missing = [column for column in columns if column not in types]
    if missing:
        raise SchemaProblem(f'table "{tables.schema_}"."{name}" has no column {", ".join(missing)}')
    for column in use.times:
        if types[column] not in catalog.TIMES:
            raise SchemaProblem(f'column "{column}" of table "{name}" is {types[column]}, not a time')
    for leaf in catalog.leaves(connection, oid, columns[0]):
        catalog.require_privileges(connection, leaf, *use.privileges)


def _indexes(database: Database, settings: Settings, job: Job[Any]) -> Iterator[Finding]:
    tables = settings.database.tables
    for key, column in job.wanted_indexes:
        with database.transaction() as connection:
            oid, _ = catalog.find_table(connection, tables.schema_, getattr(tables, key), column)
            leaves = catalog.leaves(connection, oid, column)
        for leaf in leaves:
            name = leaf.identifier.as_string()
            if leaf.indexed:
                yield Finding("ok", job.id, f"{name} has an index on {column}")
            else:
                yield Finding(
                    "warning",
                    job.id,
                    f"{name} has no index on {column}, so every run reads the whole table; `catfeeder-cron init-db "
                    f'--with-indexes`, or CREATE INDEX CONCURRENTLY ON {name} ("{column}")',
                )
