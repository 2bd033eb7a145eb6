"""Carry out the rows of "Actions": `due` runs the actions that are due, `webhook` is the built-in kind of action."""

from catfeeder_cron.actions.action import Handler
from catfeeder_cron.imports import load


def built_in() -> dict[str, Handler]:
    """Return the built-in handlers by their kind; the configuration names all others."""
    load("catfeeder_cron.actions.webhook")
    from catfeeder_cron.actions import webhook

    return {webhook.HANDLER.kind: webhook.HANDLER}
