"""Whether the server can make sense of the statements of custom jobs.

They are parsed and planned, not run. Planning may call functions that are declared IMMUTABLE or STABLE; that happens in
a read-only transaction which is rolled back.
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
# What the server says of syntax and of names begins with this.
_STATEMENT_AT_FAULT = b"42"


def check_statements(database: Database, settings: Settings) -> Iterator[Finding]:
    """Yield a finding for every statement of SQL that the configuration names. Raises DatabaseUnavailable."""
    for job_id, job in settings.jobs.items():
        if isinstance(job, CustomJobSettings) and job.sql is not None:
            # A disabled job can be run by hand still.
            yield _finding(database, job_id, job.sql.encode(), "error" if job.enabled else "warning")


def _finding(database: Database, job_id: str, statement: bytes, level: Level) -> Finding:
    try:
        with database.transaction(transaction_read_only="on") as connection:
            role = connection.info.user
            _parse(connection, statement)
            # Only what is planned has its privileges looked at; CREATE, CALL and their like have no plan. What may not
            # write here may in a run.
            with suppress(pg.SyntaxError, pg.ReadOnlySqlTransaction):
                connection.execute(b"EXPLAIN (COSTS OFF) " + statement, binary=True)
            raise RollBack
        return Finding("ok", job_id, "the server understands its statement")
    except PermissionDenied as error:
        told = f'{error.found}; its owner can say: GRANT ... ON ... TO "{role}"'
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        told = str(error)
    return Finding(level, job_id, f"sql: {told}")


def _parse(connection: Connection, statement: bytes) -> None:
    """Have the server parse the statement just as the job sends it. Raises DatabaseError with its primary message.

    The unnamed statement is replaced by the next one: nothing stays on the server.
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
