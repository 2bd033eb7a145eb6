"""What an action is to its handler, and what a handler is to us.

A handler returns (a text, if it has something to tell) when the action is done. It raises HopelessAction when trying
again would not help, PostponedAction when it knows when to try again, and anything else when trying again might help.
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
    """A row of "Actions" that is due, as its handler sees it."""

    id: Any
    user_id: Any
    name: str | None
    kind: str
    payload: Any
    due_at: datetime
    attempt: int
    """1 for the first."""
    key: str
    """The same at every attempt, another one for every repetition, unique over all databases."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"due_at": self.due_at.isoformat()}


Perform = Callable[[Action], Awaitable[str | None]]


@dataclass(frozen=True)
class Handler:
    """A kind of action that is built in. `open` is entered once for a run and gives what performs each action.

    What performs may be cancelled at any await, and must not block the event loop that it shares with others.
    """

    kind: str
    open: Callable[["ActionsSettings"], AbstractAsyncContextManager[Perform]]
