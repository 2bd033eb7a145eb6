"""The process that an operator's handler runs in, one action at a time: what it does to its process hurts no other.

Started by `children`, whose lines of JSON come in on standard input; the answers go to what was standard output. What
a handler prints goes to standard error. The process ends with its parent, and at the latest with the action's lease,
by a signal that needs no cooperation: nobody else is to begin the action while it is still at work here.
"""

import asyncio
import ctypes
import inspect
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import datetime
from queue import SimpleQueue
from typing import Any, TextIO

from catfeeder_cron.action import Action
from catfeeder_cron.callables import find_callable
from catfeeder_cron.errors import ConfigurationError, HopelessAction, PostponedAction

_PR_SET_PDEATHSIG = 1
_LONGEST_TRACEBACK = 8000


def main(parent: int) -> None:
    """Answer each line with an action by a line with its verdict, until there are no more."""
    _end_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    actions: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=[os.fdopen(os.dup(0), encoding="utf-8"), actions], daemon=True).start()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a handler that reads its standard input must not take our lines
    functions: dict[str, Callable[..., Any]] = {}
    while True:
        message = actions.get()
        signal.setitimer(signal.ITIMER_REAL, message["seconds"])
        verdict = _perform(message, functions)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps(verdict) + "\n")
        answers.flush()


def _listen(lines: TextIO, actions: "SimpleQueue[dict[str, Any]]") -> None:
    for line in lines:
        message = json.loads(line)
        if "call" in message:
            actions.put(message)
        elif signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, message["seconds"])
    os._exit(0)  # the parent is gone, or has no use for us any more


def _perform(message: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    given = message["action"]
    action = Action(**{**given, "due_at": datetime.fromisoformat(given["due_at"])})
    reference = message["call"]
    try:
        if reference not in functions:
            functions[reference] = find_callable(reference)
        result = functions[reference](action)
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            return _verdict("hopeless", f"{reference} is a generator function, so calling it does nothing")
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    except HopelessAction as error:
        return _verdict("hopeless", str(error))
    except PostponedAction as error:
        return _verdict("postponed", str(error), after_seconds=error.after_seconds)
    except ConfigurationError as error:
        return _verdict("postponed", str(error))
    except BaseException as error:  # noqa: BLE001 - SystemExit, too, is this handler's affair alone
        trace = traceback.format_exc()[-_LONGEST_TRACEBACK:]
        return _verdict("postponed", f"{type(error).__name__}: {error}", traceback=trace)
    return _verdict("done", result if isinstance(result, str) else None)


async def _awaited(result: Any) -> Any:
    return await result


def _verdict(outcome: str, detail: str | None, **more: object) -> dict[str, object]:
    return {"outcome": outcome, "detail": detail and detail[:_LONGEST_TRACEBACK], **more}


def _end_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
