"""Whether Cat Feeder's tables have what a job needs of them, in words that say what helps.

A run does not look: that would cost it statements, and is in vain nearly always. When one of its statements has failed
because something is not there, the reason is looked for here, so that a run says what `check` says.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from catfeeder_cron.config import DatabaseTables
from catfeeder_cron.database import Connection, Database, catalog, single
from catfeeder_cron.database.catalog import Leaf
from catfeeder_cron.errors import CatfeederCronError, DatabaseError, PermissionDenied, SchemaProblem, UndefinedObject

_NUMBERS = ("smallint", "integer", "bigint", "numeric", "real", "double precision")

_ACCESS = """
    SELECT current_user, n.nspname, has_schema_privilege(n.oid, 'USAGE'), row_security_active(c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s"""


@dataclass(frozen=True)
class TableUse:
    """What a job needs of a table of Cat Feeder's; `table` is its key in [database.tables]."""

    table: str
    privileges: tuple[str, ...]
    columns: tuple[str, ...]
    times: tuple[str, ...] = ()
    """Columns that must hold times, beside those."""
    numbers: tuple[str, ...] = ()
    """Columns that must hold numbers, beside those."""
    by_leaf: bool = False
    """The job works on each partition itself, so it needs the privileges there and not on the whole."""
    optional: bool = False
    """Without the table the job has nothing to do, which is no fault."""


def require_table(connection: Connection, tables: DatabaseTables, job_id: str, use: TableUse) -> list[str]:
    """Raise SchemaProblem unless the table is as the job needs it; return the tables whose rows may be hidden."""
    name = getattr(tables, use.table)
    columns = (*use.columns, *use.numbers, *use.times)
    oid, _ = catalog.find_table(connection, tables.schema_, name, columns[0])
    types = catalog.column_types(connection, oid)
    if missing := [column for column in columns if column not in types]:
        raise SchemaProblem(
            f'table "{tables.schema_}"."{name}" has no column {", ".join(missing)}; '
            + _remedy(use, job_id, "add what is missing")
        )
    for wanted, kinds, what in ((use.times, catalog.TIMES, "a time"), (use.numbers, _NUMBERS, "a number")):
        for column in wanted:
            if types[column] not in kinds:
                raise SchemaProblem(
                    f'column "{column}" of table "{tables.schema_}"."{name}" is {types[column]}, not {what}; '
                    + _remedy(use, job_id, "correct the column's type")
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


def _remedy(use: TableUse, job_id: str, otherwise: str) -> str:
    """Say what helps. A table that a job can do without may be another program's, which has taken its name."""
    if not use.optional:
        return f"correct [database.tables], or {otherwise.removeprefix('correct ')}"
    return (
        f"if that table is another program's, name Cat Feeder's own in [database.tables] {use.table}, or let the job "
        f"rest: `catfeeder-cron pause {job_id}`; else {otherwise}"
    )


def explain(
    problem: CatfeederCronError, job_id: str, uses: Iterable[TableUse], database: Database, tables: DatabaseTables
) -> str:
    """Say why a job has failed: in the words of `check` where its tables are not as the job needs them."""
    found: dict[str, None] = {}
    for use in uses if isinstance(problem, UndefinedObject | PermissionDenied) else ():
        try:
            with database.transaction() as connection:
                require_table(connection, tables, job_id, use)
        except SchemaProblem as fault:
            found[str(fault)] = None
        except DatabaseError:
            break  # what is known by now is all that there is to say
    return "; ".join(found) or str(problem)
