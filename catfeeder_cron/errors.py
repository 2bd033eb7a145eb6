"""Every error that this program raises on purpose, one leaf per decision that a caller makes.

CatfeederCronError
├── ConfigurationError        the configuration can't be used; all its faults at once
├── UnknownJob                no job has this id (wrong usage)
├── JobIsRunning              the job is running already, here or elsewhere
├── DatabaseError             PostgreSQL refused; trying again as it is would not help
│   ├── DatabaseUnavailable   no connection, or it broke: try again later
│   ├── StatementTimeout      a statement took longer than it may
│   ├── LockTimeout           somebody else holds a lock that is not worth waiting for
│   ├── ConstraintViolation   a constraint keeps the change from being made
│   └── SchemaProblem         a table, a column or a privilege is missing
│       └── PermissionDenied  the server refused it to this role
├── HopelessAction            trying this action again would not help
├── PostponedAction           this attempt of an action failed, and when the next one may be is known
├── CallableRaised            an operator's callable raised an exception of its own
├── ChildDied                 the process that a callable ran in ended before it had answered
├── RenewalError              no OAuth token could be renewed, for a reason of ours
└── JobInterrupted            a run was asked to stop before it was done
    ├── JobSkipped            there is nothing to run on; no failure
    ├── JobAborted            the process is stopping
    └── JobTimedOut           the run used up its time

A message says what was being done, what was found and what to do next, in one line. No message ever
holds a secret.
"""

from collections.abc import Sequence


class CatfeederCronError(Exception):
    """The base of all errors that are told in one line, without a traceback."""


class ConfigurationError(CatfeederCronError):
    """The configuration can't be used. `faults` holds one line for each fault."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class UnknownJob(CatfeederCronError):
    """No job has the id that was asked for."""


class JobIsRunning(CatfeederCronError):
    """The job is under way, in this process or in another, and is never run twice at once."""


class DatabaseError(CatfeederCronError):
    """PostgreSQL refused what was asked of it, and would again."""


class DatabaseUnavailable(DatabaseError):
    """There is no connection to the server, or it broke: the same may work later."""


class StatementTimeout(DatabaseError):
    """A statement was cancelled because it took longer than it may."""


class LockTimeout(DatabaseError):
    """A lock was not to be had in the short time that was spent on it."""


class ConstraintViolation(DatabaseError):
    """A constraint (its name in `constraint`) keeps the change from being made."""

    def __init__(self, message: str, constraint: str | None) -> None:
        self.constraint = constraint
        super().__init__(message)


class SchemaProblem(DatabaseError):
    """A table, a column or a privilege that is needed is missing."""


class PermissionDenied(SchemaProblem):
    """The server refused a statement to this role. `found` is what it said, for those who know a better remedy."""

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"{found}; `catfeeder-cron check` says what this role lacks")


class HopelessAction(CatfeederCronError):
    """An action can't be done, now or later. A handler raises it to have the action failed at once."""


class PostponedAction(CatfeederCronError):
    """An attempt failed; the next one may not be made sooner than `after_seconds` from now."""

    def __init__(self, reason: str, after_seconds: float = 0) -> None:
        self.after_seconds = after_seconds
        super().__init__(reason)


class CallableRaised(CatfeederCronError):
    """An operator's callable raised an exception: of class `class_name`, whose text may hold anything."""

    def __init__(self, class_name: str, text: str, traceback: str) -> None:
        self.class_name = class_name
        self.traceback = traceback
        super().__init__(f"{class_name}: {text}")


class ChildDied(CatfeederCronError):
    """The process of an operator's callable could not be started, or ended before the callable had returned."""


class RenewalError(CatfeederCronError):
    """There were OAuth tokens to renew and none could be, because of how we are set up."""


class JobInterrupted(CatfeederCronError):
    """A job's run ends early. The message is the reason that goes into the history."""


class JobSkipped(JobInterrupted):
    """There is nothing that the job could run on."""


class JobAborted(JobInterrupted):
    """The process stops, and the run with it."""


class JobTimedOut(JobInterrupted):
    """The run used up its time."""
