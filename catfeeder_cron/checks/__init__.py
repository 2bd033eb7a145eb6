"""Check all that the configured jobs need; every problem comes as a finding with its remedy."""

import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from catfeeder_cron.checks.naive_columns import check_zone
from catfeeder_cron.checks.statements import check_statements
from catfeeder_cron.checks.tables import check_job
from catfeeder_cron.children.pool import Children
from catfeeder_cron.config import CustomJobSettings, Settings, holds_secret
from catfeeder_cron.database import Connection, Database, schema, single
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError, DatabaseError, DatabaseUnavailable
from catfeeder_cron.jobs import built_in
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import Finding, Level

__all__ = ["check", "check_callables"]

log_of_output = get_logger("catfeeder_cron.output")

_IMPORT_SECONDS = 30
_MOST_CLOCK_DIFFERENCE_SECONDS = 2

# The daemon writes to all tables of its schema except schema_version, which `init-db` writes as their owner.
_LEDGER_PRIVILEGES = """
    SELECT current_user, array(
        SELECT DISTINCT privilege FROM pg_tables, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) privilege
        WHERE schemaname = 'catfeeder_cron' AND tablename <> 'schema_version'
          AND NOT has_table_privilege(format('%I.%I', schemaname, tablename), privilege)),
        coalesce(has_schema_privilege(to_regnamespace('catfeeder_cron'), 'CREATE'),
                 has_database_privilege(current_database(), 'CREATE'))"""


def check(settings: Settings, database: Database) -> Iterator[Finding]:
    """Yield a finding for everything that the enabled jobs need. An operator's mistake is a finding, never an error."""
    yield from _files(settings)
    yield from check_callables(settings)
    try:
        yield from _in_database(settings, database)
    except (DatabaseError, ConfigurationError) as error:
        yield Finding("error", "database", f"{error}; the rest was not looked at")


def _in_database(settings: Settings, database: Database) -> Iterator[Finding]:
    """Yield the findings that need the database. Raises DatabaseUnavailable, instead of a finding for each job."""
    with database.transaction() as connection:
        server = list(_server(connection))
    yield from server
    yield from check_zone(database)
    yield from _schema(database)
    jobs = built_in()
    for job_id, job_settings in settings.jobs.items():
        if job_settings.enabled and job_id in jobs:
            found = list(check_job(database, settings, jobs[job_id]))
            yield from found
            if further := jobs[job_id].check:
                yield from further(database, settings, all(finding.level != "error" for finding in found))
    yield from check_statements(database, settings)


def check_callables(settings: Settings) -> Iterator[Finding]:
    """Yield a finding for every Python callable that the configuration names. A child process imports them."""
    with Children() as children:
        for job_id, job in settings.jobs.items():
            if isinstance(job, CustomJobSettings) and job.call is not None:
                # A disabled job can still be run by hand.
                yield _callable(children, job_id, job.call, "error" if job.enabled else "warning")
        for kind, reference in settings.actions.handlers.items():
            yield _callable(children, f"actions.{kind}", reference, "error")


def _callable(children: Children, subject: str, reference: str, level: Level) -> Finding:
    call = children.find("check", reference, on_line=partial(log_of_output.info, "job_output", subject=subject))
    try:
        call.future.result(timeout=_IMPORT_SECONDS)
    except TimeoutError:
        call.kill()
        message = f'"{reference}" can\'t be imported: not done after {_IMPORT_SECONDS} s; what does it wait for?'
        return Finding(level, subject, message)
    except ConfigurationError as error:
        return Finding(level, subject, f"{error}; install its package where catfeeder-cron is installed")
    except CatfeederCronError as error:
        return Finding(level, subject, f'"{reference}" can\'t be imported: {error}')
    return Finding("ok", subject, f"{reference} can be imported")


def _files(settings: Settings) -> Iterator[Finding]:
    """Yield findings about the files that others can read. Loading has already refused those that others can write."""
    try:
        secret = holds_secret(settings.path)
    except ConfigurationError as error:
        yield Finding("error", "configuration", str(error))
    else:
        ok = Finding("ok", "configuration", str(settings.path))
        yield _private("configuration", settings.path, "it holds secrets") if secret else ok
    for warning in settings.warnings:
        yield Finding("warning", "configuration", warning)
    if settings.database.url_file is not None:
        yield _private("database.url_file", Path(settings.database.url_file), "it holds the database's address")


def _private(subject: str, path: Path, what: str) -> Finding:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        # No error: under systemd the service gets a credential instead.
        return Finding("ok", subject, f"{path} can't be read by this user ({(error.strerror or '').lower()})")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        return Finding(
            "warning", subject, f"{path} can be read by others (mode {mode:04o}) and {what}: chmod 600 {path}"
        )
    return Finding("ok", subject, f"{path} has mode {mode:04o}")


def _server(connection: Connection) -> Iterator[Finding]:
    asked = time.time()
    name, clock = single(connection, "SELECT current_setting('server_version'), clock_timestamp()")
    here = datetime.fromtimestamp((asked + time.time()) / 2, UTC)
    if problem := schema.too_old(connection):
        yield Finding("error", "database", problem)
    else:
        yield Finding(
            "ok",
            "database",
            f"PostgreSQL {name}, as {connection.info.user} on {connection.info.dbname} at {connection.info.host}",
        )
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
    except DatabaseUnavailable:
        raise
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
