"""What stands in the way of the configured jobs: each finding with its remedy."""

import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from catfeeder_cron import catalog, schema
from catfeeder_cron.callables import find_callable
from catfeeder_cron.catalog import Leaf
from catfeeder_cron.config import CustomJobSettings, Settings, holds_secret
from catfeeder_cron.database import Connection, Database, single
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError, DatabaseError, SchemaProblem
from catfeeder_cron.job import Job, TableUse
from catfeeder_cron.jobs import built_in
from catfeeder_cron.output import captured_output

Level = Literal["ok", "warning", "error"]

_OLDEST_SERVER = 140000
_MOST_CLOCK_DIFFERENCE_SECONDS = 2
_NUMBERS = ("smallint", "integer", "bigint", "numeric", "real", "double precision")

# What the daemon writes; the versions are written by whoever upgrades.
_LEDGER_PRIVILEGES = """
    SELECT current_user, array(
        SELECT DISTINCT privilege FROM pg_tables, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) privilege
        WHERE schemaname = 'catfeeder_cron' AND tablename <> 'schema_version'
          AND NOT has_table_privilege(format('%I.%I', schemaname, tablename), privilege)),
        coalesce(has_schema_privilege(to_regnamespace('catfeeder_cron'), 'CREATE'),
                 has_database_privilege(current_database(), 'CREATE'))"""

_ACCESS = """
    SELECT current_user, n.nspname, has_schema_privilege(n.oid, 'USAGE'), row_security_active(c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s"""


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    message: str

    def as_json(self) -> dict[str, str]:
        return {"level": self.level, "subject": self.subject, "message": self.message}


def check(settings: Settings, database: Database) -> Iterator[Finding]:
    """Yield a finding for everything that the enabled jobs rely on. Raises nothing that an operator can cause."""
    yield from _files(settings)
    yield from check_callables(settings)
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


def check_callables(settings: Settings) -> Iterator[Finding]:
    """Yield a finding for every Python callable that the configuration names. This imports them."""
    for job_id, job in settings.jobs.items():
        if isinstance(job, CustomJobSettings) and job.call is not None:
            # A disabled job can be run by hand still.
            yield _callable(job_id, job.call, "error" if job.enabled else "warning")
    for kind, reference in settings.actions.handlers.items():
        yield _callable(f"actions.{kind}", reference, "error")


def _callable(subject: str, reference: str, level: Level) -> Finding:
    try:
        with captured_output():
            find_callable(reference)
    except ConfigurationError as error:
        return Finding(level, subject, f"{error}; install its package where catfeeder-cron is installed")
    return Finding("ok", subject, f"{reference} can be imported")


def _files(settings: Settings) -> Iterator[Finding]:
    """Who else can read the secrets. Who else can write them was looked at before they were read."""
    try:
        secret = holds_secret(settings.path)
    except ConfigurationError as error:
        yield Finding("error", "configuration", str(error))
    else:
        ok = Finding("ok", "configuration", str(settings.path))
        yield _private("configuration", settings.path, "it holds secrets") if secret else ok
    if settings.database.url_file is not None:
        yield _private("database.url_file", Path(settings.database.url_file), "it holds the database's address")


def _private(subject: str, path: Path, what: str) -> Finding:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        # Under systemd the service gets a credential instead.
        return Finding("ok", subject, f"{path} can't be read by this user ({(error.strerror or '').lower()})")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        return Finding(
            "warning", subject, f"{path} can be read by others (mode {mode:04o}) and {what}: chmod 600 {path}"
        )
    return Finding("ok", subject, f"{path} has mode {mode:04o}")


def _server(connection: Connection) -> Iterator[Finding]:
    asked = time.time()
    version, name, clock = single(
        connection,
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'), clock_timestamp()",
    )
    if version < _OLDEST_SERVER:
        yield Finding("error", "database", f"PostgreSQL {name} is too old; upgrade the server to 14 or newer")
    else:
        yield Finding("ok", "database", f"PostgreSQL {name}, as {connection.info.user} on {connection.info.dbname}")
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
            role, lacking, may_create = single(connection, _LEDGER_PRIVILEGES)
        schema.refuse_unknown(installed)
    except DatabaseError as error:
        yield Finding("error", "schema", str(error))
        return
    if installed < schema.known_version():
        state = "is missing" if installed == 0 else f"has version {installed}, older than this program"
        if may_create:
            yield Finding(
                "warning", "schema", f"catfeeder_cron {state}; `start` sees to it, or `catfeeder-cron init-db`"
            )
        else:
            yield Finding("error", "schema", f"catfeeder_cron {state}; run `catfeeder-cron init-db` as the owner")
    else:
        yield Finding("ok", "schema", f"catfeeder_cron, version {installed}")
    if lacking:
        yield Finding(
            "error",
            "schema",
            f'role "{role}" lacks {", ".join(sorted(lacking))} on tables of the schema catfeeder_cron; '
            "its owner can say: GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "
            f'catfeeder_cron TO "{role}"',
        )


def _job(database: Database, settings: Settings, job: Job[Any]) -> Iterator[Finding]:
    try:
        missing = [finding for use in job.tables for finding in _table(database, settings, job.id, use)]
        yield from missing
        if not missing:
            if job.tables:
                yield Finding("ok", job.id, "tables, columns and privileges are there")
            yield from _indexes(database, settings, job)
    except CatfeederCronError as error:
        yield Finding("error", job.id, str(error))


def _table(database: Database, settings: Settings, job_id: str, use: TableUse) -> Iterator[Finding]:
    """Yield a finding unless the table is as the job needs it."""
    try:
        with database.transaction() as connection:
            hidden = _require(connection, settings, use)
    except SchemaProblem as error:
        yield Finding("warning" if use.optional else "error", job_id, str(error))
        return
    for table in hidden:
        yield Finding(
            "warning",
            job_id,
            f"row-level security may hide rows of {table} from this role; its owner can add a policy for the role, "
            "or a superuser can say ALTER ROLE ... BYPASSRLS",
        )


def _require(connection: Connection, settings: Settings, use: TableUse) -> list[str]:
    """Raise SchemaProblem unless the table is as the job needs it; return the tables whose rows may be hidden."""
    tables = settings.database.tables
    name = getattr(tables, use.table)
    columns = (*use.columns, *use.numbers, *use.times)
    oid, _ = catalog.find_table(connection, tables.schema_, name, columns[0])
    types = catalog.column_types(connection, oid)
    if missing := [column for column in columns if column not in types]:
        raise SchemaProblem(
            f'table "{tables.schema_}"."{name}" has no column {", ".join(missing)}; '
            "correct [database.tables], or add what is missing"
        )
    for wanted, kinds, what in ((use.times, catalog.TIMES, "a time"), (use.numbers, _NUMBERS, "a number")):
        for column in wanted:
            if types[column] not in kinds:
                raise SchemaProblem(
                    f'column "{column}" of table "{tables.schema_}"."{name}" is {types[column]}, not {what}; '
                    "correct [database.tables], or the column's type"
                )
    whole = Leaf(oid, tables.schema_, name, 0, 0, indexed=False)
    places = catalog.leaves(connection, oid, columns[0]) if use.by_leaf else [whole]
    hidden = []
    for place in places:
        role, owner_schema, usable, filtered = single(connection, _ACCESS, [place.oid])
        if not usable:
            raise SchemaProblem(
                f'role "{role}" lacks USAGE on schema "{owner_schema}"; its owner can say: '
                f'GRANT USAGE ON SCHEMA "{owner_schema}" TO "{role}"'
            )
        catalog.require_privileges(connection, place, *use.privileges)
        if filtered:
            hidden.append(place.identifier.as_string())
    return hidden


def _indexes(database: Database, settings: Settings, job: Job[Any]) -> Iterator[Finding]:
    tables = settings.database.tables
    for key, column, state in job.wanted_indexes:
        with database.transaction() as connection:
            oid, _ = catalog.find_table(connection, tables.schema_, getattr(tables, key), column)
            leaves = catalog.leaves(connection, oid, column, state)
        where = f" WHERE state = '{state}'" if state else ""
        for leaf in leaves:
            name = leaf.identifier.as_string()
            if leaf.indexed:
                yield Finding("ok", job.id, f"{name} has an index on {column}{where}")
            else:
                yield Finding(
                    "warning",
                    job.id,
                    f"{name} has no index on {column}{where}, so every run reads the whole table; "
                    f'`catfeeder-cron init-db --with-indexes`, or CREATE INDEX CONCURRENTLY ON {name} ("{column}")'
                    f"{where}",
                )
