"""Finds the Python functions that the configuration names: "package.module:function"."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from catfeeder_cron.errors import ConfigurationError
from catfeeder_cron.logs import one_line


def find_callable(reference: str) -> Callable[..., Any]:
    """Import "package.module:function" and return it. Raises ConfigurationError, in one line, where that fails."""
    module_name, _, path = reference.partition(":")
    try:
        found: Any = import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a script without a guard ends in SystemExit
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ConfigurationError(f'"{reference}" can\'t be imported: {reason}') from error
    if not callable(found):
        raise ConfigurationError(f'"{reference}" is {type(found).__name__}, expected something callable')
    return found  # type: ignore[no-any-return]
