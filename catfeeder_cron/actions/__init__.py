"""The built-in handlers of actions, a module for each kind. Every module here defines `HANDLER`."""

import pkgutil
from importlib import import_module

from catfeeder_cron.action import Handler
from catfeeder_cron.imports import load


def built_in() -> dict[str, Handler]:
    """Return the handler of every module in this folder by its kind."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    load(*names)
    return {module.HANDLER.kind: module.HANDLER for module in map(import_module, names)}
