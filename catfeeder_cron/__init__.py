"""The maintenance jobs of a Cat Feeder web backend: as a daemon, and as two classes for programs that embed them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from catfeeder_cron.version import __version__

if TYPE_CHECKING:
    from catfeeder_cron.actions.action import Action
    from catfeeder_cron.errors import HopelessAction, PostponedAction
    from catfeeder_cron.run_control import stopping
    from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
    from catfeeder_cron.scheduler.crons import Crons

__all__ = ["Action", "BackgroundTasks", "Crons", "HopelessAction", "PostponedAction", "__version__", "stopping"]


_HOMES = {
    "Action": "catfeeder_cron.actions.action",
    "BackgroundTasks": "catfeeder_cron.scheduler.background_tasks",
    "Crons": "catfeeder_cron.scheduler.crons",
    "HopelessAction": "catfeeder_cron.errors",
    "PostponedAction": "catfeeder_cron.errors",
    "stopping": "catfeeder_cron.run_control",
}


def __getattr__(name: str) -> Any:
    """Import these names on first use (PEP 562): the command line's `--help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from catfeeder_cron.imports import load

    load(_HOMES[name])
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the names that are imported on first use as well: for `dir()`, `help()` and tab completion."""
    return sorted({*globals(), *__all__})
