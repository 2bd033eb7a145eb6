"""Check that the server understands the SQL statements of custom jobs.

It parses and plans them, and does not run them. Planning may call functions that are declared IMMUTABLE or STABLE; so
it happens in a read-only transaction which is rolled back.
"""

from collections.abc import Iterator
from contextlib import suppress

from psycopg import errors as pg
from psycopg import pq

from catfeeder_cron.config import CustomJobSettings, Settings
from catfeeder_cron.database import Connection, Database, RollBack
from catfeeder_cron.errors import DatabaseError, DatabaseUnavailable, PermissionDenied
from catfeeder_cron.logs import one_line
from catfeeder_cron.report import Finding, Level

_PERMISSION_DENIED = b"42501"
# The SQLSTATEs of wrong syntax and wrong names begin with this.
_STATEMENT_AT_FAULT = b"42"


def check_statements(database: Database, settings: Settings) -> Iterator[Finding]:
    """Yield a finding for every SQL statement in the configuration. Raises DatabaseUnavailable."""
    for job_id, job in settings.jobs.items():
        if isinstance(job, CustomJobSettings) and job.sql is not None:
            # A disabled job can still be run by hand.
            yield _finding(database, job_id, job.sql.encode(), "error" if job.enabled else "warning")


def _finding(database: Database, job_id: str, statement: bytes, level: Level) -> Finding:
    try:
        with database.transaction(transaction_read_only="on") as connection:
            role = connection.info.user
            _parse(connection, statement)
            # Only planning checks the privileges; CREATE, CALL and the like have no plan (a syntax error). A statement
            # that may not write in this transaction may write in a run.
            with suppress(pg.SyntaxError, pg.ReadOnlySqlTransaction):
                connection.execute(b"EXPLAIN (COSTS OFF) " + statement, binary=True)
            raise RollBack
        return Finding("ok", job_id, "the server understands its statement")
    except PermissionDenied as error:
        problem = f'{error.found}; its owner can say: GRANT ... ON ... TO "{role}"'
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        problem = str(error)
    return Finding(level, job_id, f"sql: {problem}")


def _parse(connection: Connection, statement: bytes) -> None:
    """Make the server parse the statement, exactly as the job sends it. Raises DatabaseError with its primary message.

    It becomes the unnamed statement, which the next statement replaces, so nothing stays on the server.
    """
    parsed = connection.pgconn.prepare(b"", statement)
    if parsed.status != pq.ExecStatus.COMMAND_OK:
        code = parsed.error_field(pq.DiagnosticField.SQLSTATE)
        if code is None:
            raise DatabaseUnavailable(one_line(parsed.get_error_message()))
        message = one_line((parsed.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or code).decode(errors="replace"))
        if code == _PERMISSION_DENIED:
            raise PermissionDenied(message)
        remedy = "; correct it, or create what it needs" if code.startswith(_STATEMENT_AT_FAULT) else ""
        raise DatabaseError(message + remedy)
    if connection.pgconn.describe_prepared(b"").nparams:
        raise DatabaseError("it has parameters ($1), and a job has nothing to give for them")
