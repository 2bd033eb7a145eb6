"""The built-in handlers of actions, a module for each kind. Every module here defines `HANDLER`."""

import pkgutil
from importlib import import_module

from catfeeder_cron.action import Handler


def built_in() -> dict[str, Handler]:
    """Return the handler of every module in this folder by its kind."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.HANDLER.kind: module.HANDLER for module in modules}
