"""An action that takes no time. A module of its own: each handler's process imports it."""

from catfeeder_cron.actions.action import Action


def noop(_action: Action) -> None:
    pass
