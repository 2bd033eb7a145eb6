"""Translates psycopg's errors into the program's own, in one table."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors as pg
from psycopg_pool import PoolClosed

from catfeeder_cron.database.bounded import NoAnswer, TakesNoWrites
from catfeeder_cron.errors import (
    ConstraintViolation,
    DatabaseError,
    DatabaseUnavailable,
    LockTimeout,
    PermissionDenied,
    StatementTimeout,
    UndefinedObject,
)

_UNDEFINED = (
    *(pg.UndefinedTable, pg.UndefinedColumn, pg.InvalidSchemaName),
    # A column of another type: the server finds no operator for it, or can't assign our value to it.
    *(pg.UndefinedFunction, pg.DatatypeMismatch),
)

CLOSED = "the program has closed its connections to the database, because it ends"


class AllInUse(DatabaseUnavailable):
    """The server answers, but every connection of this process stayed in use."""


class Unanswered(DatabaseUnavailable):
    """The server has not answered in time."""


class ServerFull(DatabaseUnavailable):
    """The server answers, and may serve what needs no room, but its disk is full."""


class RollBack(Exception):
    """Raised inside a transaction's block, it rolls the transaction back and ends the block without an error."""


@contextmanager
def translated() -> Iterator[None]:
    """Raise the errors that psycopg raises inside the `with` block as DatabaseErrors."""
    try:
        yield
    except (psycopg.Error, PoolClosed) as error:
        # `from None`: the original's text can hold a token (its DETAIL quotes rows), so it must not
        # reach a traceback.
        raise translate(error) from None


def translate(error: Exception) -> DatabaseError:
    """Return our error for psycopg's, with SQLSTATE, primary message and constraint, never DETAIL or the statement."""
    if isinstance(error, PoolClosed):
        return DatabaseUnavailable(CLOSED)
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return _without_sqlstate(error)
    message = _one_line(f"{error.diag.message_primary} (SQLSTATE {error.sqlstate})")
    match error:
        case pg.QueryCanceled():
            return StatementTimeout(message)
        # SerializationFailure: the row moved to another partition while the statement waited for it.
        case pg.LockNotAvailable() | pg.DeadlockDetected() | pg.SerializationFailure():
            return LockTimeout(message)
        case pg.IntegrityError():
            return ConstraintViolation(message, error.diag.constraint_name)
        case pg.InsufficientPrivilege():
            return PermissionDenied(message)
        case error if isinstance(error, _UNDEFINED):
            return UndefinedObject(message)
        case pg.DiskFull():
            return ServerFull(message)
        case _ if error.sqlstate[:2] in {"08", "28", "3D", "53"} or error.sqlstate[:3] == "57P":
            return DatabaseUnavailable(message)
        case _:
            return DatabaseError(message)


def _without_sqlstate(error: Exception) -> DatabaseError:
    if isinstance(error, NoAnswer):
        return Unanswered(_one_line(str(error)))
    if isinstance(error, TakesNoWrites):
        return DatabaseUnavailable(str(error))
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return DatabaseUnavailable(_one_line(f"no connection to the database: {error}"))
    return DatabaseError(_one_line(f"the statement could not be sent, or its answer not be read: {error}"))


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
