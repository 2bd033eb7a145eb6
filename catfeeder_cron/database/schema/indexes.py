"""Creates the indexes that make the jobs cheap, while the web server runs."""

import zlib
from collections.abc import Collection, Iterable, Iterator

from psycopg import sql

from catfeeder_cron.config.settings import DatabaseTables
from catfeeder_cron.database import catalog
from catfeeder_cron.database.catalog import Leaf, WantedIndex
from catfeeder_cron.database.database import Database
from catfeeder_cron.database.schema import verb
from catfeeder_cron.database.statements import single
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, PermissionDenied, SchemaProblem

_STATE = """
    SELECT i.indisvalid, EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = i.indexrelid)
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %s AND c.relname = %s"""

# One lock for each table, so that one process at a time builds its indexes; a transaction that stays open meanwhile
# holds it. The statement has no parameters, because the answer to a statement that has some keeps its snapshot up to
# the next statement, and CREATE INDEX CONCURRENTLY waits for every snapshot that is older than its own.
_TRY_LOCK = "SELECT pg_try_advisory_xact_lock(7241386209 + {})"


def create_indexes(
    database: Database,
    tables: DatabaseTables,
    wanted: Iterable[WantedIndex],
    *,
    needed: Collection[str] = (),
    dry_run: bool = False,
) -> Iterator[str]:
    """Create the wanted indexes that are missing, on every leaf of a table, and yield a line for each.

    CONCURRENTLY: reading and writing go on, an interruption rolls nothing back, and no statement timeout applies.
    An invalid index of an interrupted try is rebuilt; an index that another process is building is left to it. A table
    that is missing or lacks the column is no failure unless its key is in `needed`. Raises SchemaProblem at the end,
    with a line for each index that could not be created.
    """
    problems = []
    for each in wanted:
        name, column = getattr(tables, each.table), each.column
        described = f'index on "{tables.schema_}"."{name}" ({column})'
        try:
            with database.transaction() as connection:
                oid, _ = catalog.find_table(connection, tables.schema_, name, column)
                leaves = catalog.leaves(connection, oid, column, each.state)
        except SchemaProblem as error:
            if each.table in needed:
                problems.append(f"no {described}: {error}")
            elif dry_run:
                yield f"{verb(dry_run)} {described}, once the table is there"
            else:
                yield f"no {described}: {error}"
            continue
        for leaf in leaves:
            if not leaf.indexed:
                try:
                    yield from _create_index(database, leaf, each, dry_run)
                except SchemaProblem as error:
                    problems.append(str(error))
    if problems:
        raise SchemaProblem("\n".join(problems))


def _create_index(database: Database, leaf: Leaf, wanted: WantedIndex, dry_run: bool) -> Iterator[str]:
    described = f'index on "{leaf.schema}"."{leaf.name}" ({wanted.column})'
    if wanted.state is not None:
        described += f" for the state '{wanted.state}'"
    if dry_run:
        yield f"{verb(dry_run)} {described}"
        return
    try:
        # Two builds on one table deadlock: the second waits for the first's lock, with a snapshot that the first waits
        # for.
        with database.transaction(idle_in_transaction_session_timeout=0) as connection:
            if single(connection, sql.SQL(_TRY_LOCK).format(sql.Literal(leaf.oid)))[0]:
                yield from _create_alone(database, leaf, wanted, described)
            else:
                yield f"{described}: left to the process that is creating it"
    except DatabaseUnavailable:
        raise
    except PermissionDenied as error:
        raise SchemaProblem(f"no {described}: {error.found}; run `init-db` as the owner") from None
    except DatabaseError as error:
        raise SchemaProblem(f"no {described}: {error}") from None


def _create_alone(database: Database, leaf: Leaf, wanted: WantedIndex, described: str) -> Iterator[str]:
    # Every process computes the same name, by which an invalid index is found and dropped. PostgreSQL cuts names off
    # after 63 bytes, so the unique part comes first.
    where: sql.Composable = sql.SQL("")
    unique = [leaf.schema, leaf.name, wanted.column]
    if wanted.state is not None:
        where = sql.SQL(" WHERE state = {}").format(wanted.state)
        unique.append(wanted.state)
    marker = zlib.crc32(".".join(unique).encode())
    index = f"catfeeder_cron_{marker:08x}_{leaf.name[:15]}_{wanted.column[:15]}"
    with database.session(unbounded=True) as connection:
        connection.execute("SET statement_timeout = 0")
        connection.execute("SET lock_timeout = 0")
        try:
            state = connection.execute(_STATE, [leaf.schema, index]).fetchone()
            if state is not None:
                valid, being_built = state
                if being_built:
                    yield f"{described}: left to the session that is building it"
                    return
                if valid:
                    return
                drop = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}")
                connection.execute(drop.format(sql.Identifier(leaf.schema, index)))
            create = sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} ({}){}")
            column = sql.Identifier(wanted.column)
            connection.execute(create.format(sql.Identifier(index), leaf.identifier, column, where))
            yield f"{verb(dry_run=False)} {described}"
        finally:
            # Behind a transaction pooler the next client would inherit these.
            connection.execute("RESET statement_timeout")
            connection.execute("RESET lock_timeout")
