"""What "Actions" may ask for, and the run that does it: `due` carries out, `webhook` is the kind that is built in."""

from catfeeder_cron.actions.action import Handler
from catfeeder_cron.imports import load


def built_in() -> dict[str, Handler]:
    """Return the handlers that no configuration has to name, by their kind."""
    load("catfeeder_cron.actions.webhook")
    from catfeeder_cron.actions import webhook

    return {webhook.HANDLER.kind: webhook.HANDLER}
