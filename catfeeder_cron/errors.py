"""Every error that this program raises on purpose, with one leaf per decision that a caller makes.

CatfeederCronError
├── ConfigurationError        the configuration can't be used; all its faults at once
├── UnknownJob                no job has this id (wrong usage)
├── JobIsRunning              the job is running already, here or elsewhere
├── DatabaseError             PostgreSQL refused; trying again as it is would not help
│   ├── DatabaseUnavailable   no connection, or it broke: try again later
│   ├── StatementTimeout      a statement took longer than it may
│   ├── LockTimeout           another transaction held a lock for too long
│   ├── ConstraintViolation   a constraint keeps the change from being made
│   └── SchemaProblem         a table, a column or a privilege is missing, or a column is of another type
│       ├── UndefinedObject   a statement names a table or column that is missing, or has another type
│       └── PermissionDenied  the server refused it to this role
├── HopelessAction            trying this action again would not help
├── PostponedAction           this attempt of an action failed, and says when the next one may be made
├── CallableRaised            an operator's callable raised an exception of its own
├── ChildDied                 the process of a callable ended before it had answered
├── RenewalError              no OAuth token could be renewed, for a reason on our side
└── JobInterrupted            a run was asked to stop before it was done
    ├── JobSkipped            there is nothing to run on; no failure
    ├── JobAborted            the process is stopping
    └── JobTimedOut           the run used up its time

A message says in one line which step failed, what was found and what to do next. No message ever holds a
secret.
"""

from collections.abc import Sequence

GRACE_SECONDS = 10.0
"""How long what runs in a process of its own may take to end after a request to stop whose reason does not say more."""


class CatfeederCronError(Exception):
    """The base of all errors that the program reports in one line, without a traceback."""


class ConfigurationError(CatfeederCronError):
    """The configuration can't be used. `faults` holds one line for each fault."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class UnknownJob(CatfeederCronError):
    """No job has the given id."""


class JobIsRunning(CatfeederCronError):
    """The job is under way, in this process or in another, and is never run twice at once."""


class DatabaseError(CatfeederCronError):
    """PostgreSQL refused a statement, and would refuse it again."""


class DatabaseUnavailable(DatabaseError):
    """There is no connection to the server, or it broke: the same statement may work later."""


class StatementTimeout(DatabaseError):
    """The server cancelled a statement because it took longer than its timeout."""


class LockTimeout(DatabaseError):
    """A statement did not get a lock in the short time for which it may wait."""


class ConstraintViolation(DatabaseError):
    """A constraint forbids the change; `constraint` is its name."""

    def __init__(self, message: str, constraint: str | None) -> None:
        self.constraint = constraint
        super().__init__(message)


class SchemaProblem(DatabaseError):
    """A table, a column or a privilege is missing, or a column has another type."""


class UndefinedObject(SchemaProblem):
    """The server does not know a table or column that a statement names, or the column has another type.

    The caller can look into the catalog for the cause.
    """


class PermissionDenied(SchemaProblem):
    """The server refused a statement to this role. `found` is its message, for a caller that knows a better remedy."""

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"{found}; `catfeeder-cron check` says what this role lacks")


class HopelessAction(CatfeederCronError):
    """An action can't be done, now or later. A handler raises it to have the action failed at once."""


class PostponedAction(CatfeederCronError):
    """An attempt of an action failed; the next one may not be made sooner than `after_seconds` from now."""

    def __init__(self, reason: str, after_seconds: float = 0) -> None:
        self.after_seconds = after_seconds
        super().__init__(reason)


class CallableRaised(CatfeederCronError):
    """An operator's callable raised an exception of the class `class_name`. Its text may hold secrets."""

    def __init__(self, class_name: str, text: str, traceback: str) -> None:
        self.class_name = class_name
        self.traceback = traceback
        super().__init__(f"{class_name}: {text}")


class ChildDied(CatfeederCronError):
    """The process of an operator's callable could not be started, or ended before the callable had returned."""


class RenewalError(CatfeederCronError):
    """There were OAuth tokens to renew and none could be renewed, for a reason on our side."""


class JobInterrupted(CatfeederCronError):
    """A job's run ends early. The message is the reason in the history.

    What the run has started in other processes is killed `grace_seconds` after it was asked to stop.
    """

    def __init__(self, reason: str = "", grace_seconds: float = GRACE_SECONDS) -> None:
        self.grace_seconds = grace_seconds
        super().__init__(reason)


class JobSkipped(JobInterrupted):
    """The job has nothing to run on. This is no failure."""


class JobAborted(JobInterrupted):
    """The process stops, or may have been taken for dead, and the run ends with it."""


class JobTimedOut(JobInterrupted):
    """The run used up its time."""
