"""The maintenance jobs of a Cat Feeder web backend: as a daemon, and as two classes for programs that embed them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catfeeder_cron.action import Action
    from catfeeder_cron.background_tasks import BackgroundTasks
    from catfeeder_cron.crons import Crons
    from catfeeder_cron.errors import HopelessAction, PostponedAction
    from catfeeder_cron.run_control import stopping

__version__ = "0.1.0"
__all__ = ["Action", "BackgroundTasks", "Crons", "HopelessAction", "PostponedAction", "__version__", "stopping"]


def __getattr__(name: str) -> Any:
    """Import these names on first use (PEP 562): the command line's `--help` needs none of them."""
    if name == "Action":
        from catfeeder_cron.action import Action

        return Action
    if name == "BackgroundTasks":
        from catfeeder_cron.background_tasks import BackgroundTasks

        return BackgroundTasks
    if name == "Crons":
        from catfeeder_cron.crons import Crons

        return Crons
    if name == "stopping":
        from catfeeder_cron.run_control import stopping

        return stopping
    if name in ("HopelessAction", "PostponedAction"):
        from catfeeder_cron import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names that are imported on first use as well: for `dir()`, `help()` and tab completion."""
    return sorted({*globals(), *__all__})
