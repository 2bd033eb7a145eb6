"""Read a whole configuration, or report all its faults."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

from catfeeder_cron.config import database_url, sources, web_server
from catfeeder_cron.config.faults import Faults
from catfeeder_cron.config.job_settings import JobSettings
from catfeeder_cron.config.job_tables import read_jobs
from catfeeder_cron.config.settings import SECTIONS, Settings


def load(
    path: Path | None = None,
    *,
    jobs: Mapping[str, type[JobSettings]] = MappingProxyType({}),
    environ: Mapping[str, str] = os.environ,
    needs_address: bool = True,
) -> Settings:
    """Return the configuration in `path`, or in the place where sources.find finds one.

    `jobs` are the built-in jobs by id, each with the class of its settings; every other id belongs to a custom job.
    Raises ConfigurationError with a line for every fault of the file. A url_file that can't be read is a fault only if
    `needs_address`.
    """
    file = sources.find(path, environ)
    document = sources.parse(file)
    faults = Faults(file)
    document = web_server.translate(document, {*SECTIONS, "jobs"}, jobs, faults)
    for key in document:
        if key not in {*SECTIONS, "jobs"}:
            faults.unknown((key,), {*SECTIONS, "jobs", "Crons"})
    sections: dict[str, Any] = {
        name: faults.check(model, document.get(name, {}), (name,)) for name, model in SECTIONS.items()
    }
    if isinstance(table := document.get("database"), dict) and {"url", "url_file"} <= table.keys():
        faults.add(("database", "url_file"), "got it beside url, expected one of the two")
    scheduler, database = sections["scheduler"], sections["database"]
    timezone = scheduler.timezone if scheduler else ZoneInfo("UTC")
    job_settings = read_jobs(document.get("jobs", {}), jobs, timezone, faults)
    if database:
        sections["database"] = database_url.resolve(database, file, environ, faults, needs_address=needs_address)
    faults.raise_if_any()
    return Settings(path=file, jobs=job_settings, warnings=faults.warnings, **sections)
