"""The built-in jobs, one file each. A file here whose name has no leading underscore defines `JOB`."""

import pkgutil
from importlib import import_module
from typing import Any

from catfeeder_cron.imports import load
from catfeeder_cron.job import Job


def built_in() -> dict[str, Job[Any]]:
    """Return the job of every file in this folder by its id, in the order of the ids."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    load(*names)
    jobs = (module.JOB for module in map(import_module, names))
    return {job.id: job for job in sorted(jobs, key=lambda job: job.id)}
