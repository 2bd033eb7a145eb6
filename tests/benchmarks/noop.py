"""An action that takes no time. A module of its own: each handler's process imports it."""

from catfeeder_cron.action import Action


def noop(_action: Action) -> None:
    pass
