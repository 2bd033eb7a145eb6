"""The daemon's own schema, `catfeeder_cron`: numbered SQL files, applied once each and never changed afterwards."""

from collections.abc import Iterator
from importlib.resources import files
from typing import LiteralString

from catfeeder_cron.database.database import Database
from catfeeder_cron.database.statements import Connection, single
from catfeeder_cron.errors import PermissionDenied, SchemaProblem

_OLDEST_SERVER = 140000

# Every process that creates or upgrades the schema takes this lock, so that one of them does the work while the others
# wait; the lock ends with its transaction.
LOCK = "SELECT pg_advisory_xact_lock(7241386209)"

# This reads the catalog's tables: to_regclass would answer from the session's cache, which can be older than the wait
# for the lock.
_EXISTS = """
    SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                   WHERE n.nspname = 'catfeeder_cron' AND c.relname = 'schema_version')"""


def _migrations() -> list[tuple[int, str, LiteralString]]:
    """Return (version, name, SQL) of every numbered file, in order."""
    folder = sorted((file for file in files(__name__).joinpath("daemon").iterdir()), key=lambda file: file.name)
    return [(int(file.name[:4]), file.name, file.read_text("utf-8")) for file in folder]


def known_version() -> int:
    """Return the version of the schema that this program was written for."""
    return _migrations()[-1][0]


def too_old(connection: Connection) -> str:
    """Return an error message for a server that is too old for this program's statements, else an empty text."""
    version, name = single(
        connection, "SELECT current_setting('server_version_num')::int, current_setting('server_version')"
    )
    return "" if version >= _OLDEST_SERVER else f"PostgreSQL {name} is too old; upgrade the server to 14 or newer"


def installed_version(connection: Connection) -> int:
    """Return the version of the schema in this database, 0 where there is none."""
    if not single(connection, _EXISTS)[0]:
        return 0
    (readable,) = single(
        connection,
        "SELECT has_schema_privilege('catfeeder_cron', 'USAGE') "
        "AND has_table_privilege('catfeeder_cron.schema_version', 'SELECT')",
    )
    if not readable:
        raise SchemaProblem("this role may not read the schema catfeeder_cron; see the GRANTs in the README")
    (version,) = single(connection, "SELECT coalesce(max(version), 0) FROM catfeeder_cron.schema_version")
    return int(version)


def upgrade(database: Database, *, dry_run: bool = False) -> Iterator[str]:
    """Apply the numbered files that are missing, in one transaction, and yield a line for each.

    Safe when several processes call it at once: one applies the files, the others wait and find nothing missing. Raises
    SchemaProblem where the schema is newer than this program can serve, the server is too old, or the role may not
    create it.
    """
    with database.transaction() as connection:
        if problem := too_old(connection):
            raise SchemaProblem(problem)
        if not dry_run:
            connection.execute(LOCK)
        installed = installed_version(connection)
        refuse_unknown(installed)
        for version, name, statements in _migrations():
            if version > installed:
                if not dry_run:
                    connection.execute(statements)
                    connection.execute("INSERT INTO catfeeder_cron.schema_version (version) VALUES (%s)", [version])
                yield f"{verb(dry_run)} schema catfeeder_cron: {name}"


def require(database: Database) -> None:
    """Raise SchemaProblem unless the schema is there and this program knows its version; create nothing."""
    with database.transaction() as connection:
        installed = installed_version(connection)
    refuse_unknown(installed)
    if installed < known_version():
        state = "is missing" if installed == 0 else f"has version {installed}, older than this program"
        raise SchemaProblem(f"the schema catfeeder_cron {state}: run `catfeeder-cron init-db`")


def verb(dry_run: bool) -> str:
    """Return the words that begin a line of `init-db`."""
    return "would create" if dry_run else "created"


def ensure(database: Database) -> None:
    """Create or upgrade this program's schema if that is needed.

    Raises SchemaProblem where the role may not do that (the message asks for `init-db`), or this program is too old.
    """
    with database.transaction() as connection:
        installed = installed_version(connection)
    refuse_unknown(installed)
    if installed >= known_version():
        return
    try:
        for _ in upgrade(database):
            pass
    except PermissionDenied as error:
        state = "missing" if installed == 0 else f"at version {installed}, older than this program"
        raise SchemaProblem(
            f"the schema catfeeder_cron is {state}, and this role can't change that: run `catfeeder-cron init-db` "
            f"as the database's owner ({error.found})"
        ) from error


def refuse_unknown(installed: int) -> None:
    """Raise SchemaProblem for a schema that is more than one version newer than this program."""
    known = known_version()
    if installed > known + 1:
        raise SchemaProblem(
            f"the schema catfeeder_cron has version {installed}, this program knows {known} and works with {known + 1} "
            "at most: install a newer catfeeder-cron"
        )
