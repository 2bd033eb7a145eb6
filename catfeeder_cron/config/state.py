"""Find the directory for the daemon's files."""

import os
from collections.abc import Mapping
from pathlib import Path

INSTALLED = Path("/var/lib/catfeeder-cron")


def state_directory(environ: Mapping[str, str] = os.environ, installed: Path = INSTALLED) -> Path:
    """Return $STATE_DIRECTORY (the first of several), else `installed` if it can be written, else one in the home.

    The directory need not exist.
    """
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    if installed.is_dir() and os.access(installed, os.W_OK | os.X_OK):
        return installed
    return Path(environ.get("HOME") or Path.home(), ".local/state/catfeeder-cron")
