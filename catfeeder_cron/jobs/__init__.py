"""The built-in jobs, one file each. A file here whose name has no leading underscore defines `JOB`."""

import os
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from catfeeder_cron import config
from catfeeder_cron.config import Settings
from catfeeder_cron.imports import load
from catfeeder_cron.job import Job


def load_settings(
    path: Path | None = None,
    *,
    jobs: Mapping[str, Job[Any]] | None = None,
    environ: Mapping[str, str] = os.environ,
    needs_address: bool = True,
) -> Settings:
    """Return the configuration with the settings of these jobs, by default of all built-in ones.

    Raises ConfigurationError; the other parameters are those of config.load.
    """
    known = built_in()
    settings = config.load(
        path,
        jobs={job.id: job.settings for job in (known | dict(jobs or {})).values()},
        environ=environ,
        needs_address=needs_address,
    )
    if jobs is None:
        return settings
    left = {job_id: its for job_id, its in settings.jobs.items() if job_id in jobs or job_id not in known}
    return settings.model_copy(update={"jobs": left})


def built_in() -> dict[str, Job[Any]]:
    """Return the job of every file in this folder, by its id, in the order of the ids."""
    files = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    names = [f"{__name__}.{file}" for file in files]
    load(*names)
    jobs = (module.JOB for module in map(import_module, names))
    return {job.id: job for job in sorted(jobs, key=lambda job: job.id)}
