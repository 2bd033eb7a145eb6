"""Compares Cat Feeder's tables with the needs of a job, for `check` and before every run. Its errors name a remedy."""

from collections.abc import Iterable
from dataclasses import dataclass

from catfeeder_cron.config.settings import DatabaseTables
from catfeeder_cron.database import catalog
from catfeeder_cron.database.catalog import Leaf
from catfeeder_cron.database.statements import Connection
from catfeeder_cron.errors import JobSkipped, SchemaProblem

_NUMBERS = ("smallint", "integer", "bigint", "numeric", "real", "double precision")


@dataclass(frozen=True)
class TableUse:
    """The needs of a job in one table of Cat Feeder's; `table` is its key in [database.tables]."""

    table: str
    privileges: tuple[str, ...]
    columns: tuple[str, ...]
    times: tuple[str, ...] = ()
    """Further columns, which must hold times."""
    instants: tuple[str, ...] = ()
    """Further columns, which must hold times with a time of day, so no dates."""
    numbers: tuple[str, ...] = ()
    """Further columns, which must hold numbers."""
    by_leaf: bool = False
    """The job works on each partition directly, so it needs the privileges there and not on the whole table."""
    optional: bool = False
    """Where the table is missing, the job is skipped and does not fail."""


def require_table(connection: Connection, tables: DatabaseTables, job_id: str, use: TableUse) -> list[str]:
    """Raise SchemaProblem unless the table is as the job needs it; return the tables whose rows may be hidden."""
    name = getattr(tables, use.table)
    columns = (*use.columns, *use.numbers, *use.times, *use.instants)
    oid, _ = catalog.find_table(connection, tables.schema_, name, columns[0])
    types = catalog.column_types(connection, oid)
    if missing := [column for column in columns if column not in types]:
        raise SchemaProblem(
            f'table "{tables.schema_}"."{name}" has no column {", ".join(missing)}; '
            + _remedy(use, job_id, "add what is missing")
        )
    for wanted, kinds, what in (
        (use.times, catalog.TIMES, "a time"),
        (use.instants, catalog.INSTANTS, "a timestamp"),
        (use.numbers, _NUMBERS, "a number"),
    ):
        for column in wanted:
            if types[column] not in kinds:
                raise SchemaProblem(
                    f'column "{column}" of table "{tables.schema_}"."{name}" is {types[column]}, not {what}; '
                    + _remedy(use, job_id, "correct the column's type")
                )
    whole = Leaf(oid, tables.schema_, name, 0, 0, indexed=False)
    places = catalog.leaves(connection, oid, columns[0]) if use.by_leaf else [whole]
    for place in places:
        catalog.require_privileges(connection, place, *use.privileges)
    return [place.identifier.as_string() for place in places if catalog.may_hide_rows(connection, place)]


def _remedy(use: TableUse, job_id: str, otherwise: str) -> str:
    """Return the remedy. An optional table with the wrong columns may belong to another program that uses its name."""
    if not use.optional:
        return f"correct [database.tables], or {otherwise.removeprefix('correct ')}"
    return (
        f"if that table is another program's, name Cat Feeder's own in [database.tables] {use.table}, or let the job "
        f"rest: `catfeeder-cron pause {job_id}`; else {otherwise}"
    )


def require_tables(connection: Connection, tables: DatabaseTables, job_id: str, uses: Iterable[TableUse]) -> None:
    """Raise SchemaProblem with all faults of the tables that a job uses.

    Raises JobSkipped where the first table is optional and missing.
    """
    found: dict[str, None] = {}
    is_there = False
    for use in uses:
        try:
            require_table(connection, tables, job_id, use)
        except SchemaProblem as fault:
            name = getattr(tables, use.table)
            if use.optional and not is_there and not catalog.has_table(connection, tables.schema_, name):
                raise JobSkipped(
                    f'there is no table "{tables.schema_}"."{name}"; '
                    "create it with `catfeeder-cron init-db --with-app-tables`"
                ) from None
            found[str(fault)] = None
        is_there = True
    if found:
        raise SchemaProblem("; ".join(found))
