"""Name the columns of times that have no zone, and warn where they look as if the web server wrote another zone."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from psycopg import sql

from catfeeder_cron.config import Settings
from catfeeder_cron.database import Connection, Database, catalog, single
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.database.time_columns import TimeColumn, require_zone
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, SchemaProblem
from catfeeder_cron.job import Job
from catfeeder_cron.report import Finding
from catfeeder_cron.times import format_duration

_KEY = "database.naive_timestamps"

# The web server sets these when it writes a row, so none is in the future.
_WRITTEN_NOW = ("creation_date", "edit_date")
_MOST_CLOCK_DIFFERENCE = timedelta(minutes=5)
# No two zones are further apart.
_MOST_ZONE_DIFFERENCE = timedelta(hours=26)
# Without an index on the ids it sorts the whole table.
_LONGEST_LOOK = timedelta(seconds=5)
_QUARTER = timedelta(minutes=15)

# The newest rows are those with the highest ids, for which there is an index.
_NEWEST = """
    SELECT max({written_at}) - now()
    FROM (SELECT {column} AS written FROM {table} ORDER BY id DESC LIMIT 1000) AS newest WHERE isfinite(written)"""


def check_zone(database: Database) -> Iterator[Finding]:
    """Yield a finding if the server does not know the zone of columns without one. Raises DatabaseUnavailable."""
    try:
        with database.transaction() as connection:
            require_zone(connection, database.naive_timestamps)
    except SchemaProblem as error:
        yield Finding("error", "database", str(error))


def check_naive_columns(database: Database, settings: Settings, job: Job[Any]) -> Iterator[Finding]:
    """Yield a finding for each column without a zone that a job uses. Its tables must be as it needs them.

    Raises DatabaseUnavailable.
    """
    is_set = "naive_timestamps" in settings.database.model_fields_set
    for use in job.tables:
        table = sql.Identifier(settings.database.tables.schema_, getattr(settings.database.tables, use.table))
        with database.transaction() as connection:
            naive = _naive_columns(connection, settings, use)
        for column in (*use.times, *use.instants):
            if column in naive:
                yield _named(job.id, f"{table.as_string()} ({column})", database.naive_timestamps, is_set)
        if naive.keys() & {*use.times, *use.instants}:
            for column in _WRITTEN_NOW:
                if column in naive and (ahead := _ahead(database, table, column)):
                    yield _looks_wrong(job.id, f"{table.as_string()} ({column})", database.naive_timestamps, ahead)


def _naive_columns(connection: Connection, settings: Settings, use: TableUse) -> dict[str, str]:
    tables = settings.database.tables
    columns = (*use.times, *use.instants)
    if not columns:
        return {}
    oid, _ = catalog.find_table(connection, tables.schema_, getattr(tables, use.table), columns[0])
    types = catalog.column_types(connection, oid)
    return {name: its for name, its in types.items() if its in catalog.TIMES and its != catalog.INSTANT}


def _named(job_id: str, column: str, zone: str, is_set: bool) -> Finding:
    if is_set:
        return Finding("ok", job_id, f"{column} has no time zone; it is taken in {zone}, as {_KEY} says")
    return Finding(
        "warning",
        job_id,
        f"{column} has no time zone and is taken in {zone}; set {_KEY} to the zone in which the web server writes it, "
        'such as "Europe/Paris", or to "UTC"',
    )


def _ahead(database: Database, table: sql.Identifier, column: str) -> timedelta | None:
    """Return by how much the newest rows lie in the future, if that can be told and zones can be the reason."""
    try:
        with database.transaction(timeout=_LONGEST_LOOK) as connection:
            times = TimeColumn(database.naive_timestamps)
            statement = sql.SQL(_NEWEST).format(
                written_at=times.earliest("written"), column=sql.Identifier(column), table=table
            )
            (ahead,) = single(connection, statement)
    except DatabaseUnavailable:
        raise
    except DatabaseError:
        # No column "id", no privilege on it, too many rows to sort, or a zone that the server does not know.
        return None
    is_plausible = ahead is not None and _MOST_CLOCK_DIFFERENCE < ahead <= _MOST_ZONE_DIFFERENCE
    return ahead if is_plausible else None


def _looks_wrong(job_id: str, column: str, zone: str, ahead: timedelta) -> Finding:
    least = format_duration(-(-ahead // _QUARTER) * _QUARTER)
    return Finding(
        "warning",
        job_id,
        f"{column}: its newest rows lie in the future when taken in {zone}, so the web server writes a zone whose "
        f"clocks are at least {least} ahead; correct {_KEY}",
    )
