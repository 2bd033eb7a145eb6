"""Define an action, which every handler gets, and the interface of a built-in handler.

A handler returns when the action is done, with a text for "ActionLog" or with None. It raises HopelessAction when
another attempt would not help, PostponedAction when it knows the time of the next one, and any other exception when
another attempt might help.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catfeeder_cron.config import ActionsSettings


@dataclass(frozen=True)
class Action:
    """A due row of "Actions", as its handler sees it."""

    id: Any
    user_id: Any
    name: str | None
    kind: str
    payload: Any
    due_at: datetime
    attempt: int
    """Counts from 1."""
    key: str
    """An idempotency key: equal at every attempt, different for every repetition, unique over all databases."""

    def as_json(self) -> dict[str, Any]:
        """Return an object that JSON can hold, for a handler in a child process."""
        return asdict(self) | {"due_at": self.due_at.isoformat()}


Perform = Callable[[Action], Awaitable[str | None]]


@dataclass(frozen=True)
class Handler:
    """A built-in kind of action. A run enters `open` once, and calls the function that it yields for each action.

    The function may be cancelled at any await. It must not block the event loop, which it shares with other actions.
    """

    kind: str
    open: Callable[["ActionsSettings"], AbstractAsyncContextManager[Perform]]
