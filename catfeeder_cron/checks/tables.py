"""Check that the tables of Cat Feeder have all that a job needs."""

from collections.abc import Iterator
from typing import Any

from catfeeder_cron.checks.naive_columns import check_naive_columns
from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database, catalog
from catfeeder_cron.database.requirements import TableUse, require_table
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable, SchemaProblem
from catfeeder_cron.job import Job
from catfeeder_cron.report import Finding


def check_job(database: Database, settings: Settings, job: Job[Any]) -> Iterator[Finding]:
    """Yield findings about the tables, columns, types, zones, privileges and indexes that a job declares.

    Raises DatabaseUnavailable.
    """
    try:
        missing = [finding for use in job.tables for finding in _table(database, settings, job.id, use)]
        yield from dict.fromkeys(missing)  # a schema without USAGE gives the same finding for each table
        if not missing:
            if job.tables:
                yield Finding("ok", job.id, "tables, columns and privileges are there")
            yield from check_naive_columns(database, settings, job)
            yield from _indexes(database, settings, job)
    except DatabaseUnavailable:
        raise
    except CatfeederCronError as error:
        yield Finding("error", job.id, str(error))


def _table(database: Database, settings: Settings, job_id: str, use: TableUse) -> Iterator[Finding]:
    """Yield a finding if the table lacks something that the job needs."""
    tables = settings.database.tables
    try:
        with database.transaction() as connection:
            exists = catalog.has_table(connection, tables.schema_, getattr(tables, use.table))
            hidden = require_table(connection, tables, job_id, use)
    except SchemaProblem as error:
        yield Finding("warning" if use.optional and not exists else "error", job_id, str(error))
        return
    for table in hidden:
        yield Finding(
            "warning",
            job_id,
            f"row-level security may hide rows of {table} from this role; its owner can add a policy for the role, "
            "or a superuser can say ALTER ROLE ... BYPASSRLS",
        )


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
