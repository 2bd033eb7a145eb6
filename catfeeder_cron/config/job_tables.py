"""Turn the tables under [jobs] into the settings of every job, built-in or custom."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from zoneinfo import ZoneInfo

from catfeeder_cron.config.faults import Faults
from catfeeder_cron.config.job_settings import TRIGGERS, CustomJobSettings, JobSettings
from catfeeder_cron.config.suggestions import did_you_mean

_ID = re.compile("[a-z0-9][a-z0-9-]*")


def read_jobs(
    tables: object, known: Mapping[str, type[JobSettings]], timezone: ZoneInfo, faults: Faults
) -> dict[str, JobSettings]:
    """Return the settings of every known job, in the order of `known`, then of every custom job, in the file's order.

    `tables` is the value of the key `jobs`, `timezone` is the scheduler's. Mistakes are added to `faults`.
    """
    if not isinstance(tables, dict):
        faults.mistyped(("jobs",), tables, "a table for each job")
        return {}
    settings = {}
    for job in [*known, *(job for job in tables if job not in known)]:
        valid = _read_job(job, tables.get(job, {}), known, timezone, faults)
        if valid is not None:
            settings[job] = valid
    return settings


def _read_job(
    job: str, table: object, known: Mapping[str, type[JobSettings]], timezone: ZoneInfo, faults: Faults
) -> JobSettings | None:
    where = ("jobs", job)
    if not isinstance(table, dict):
        faults.mistyped(where, table, "a table")
        return None
    if job not in known:
        if table.keys().isdisjoint(("call", "sql")) and (meant := did_you_mean(job, known)):
            faults.add(where, f"unknown job{meant} A job of your own needs call or sql")
            return None
        for fault in _custom_job_faults(job, table, known):
            faults.add(where, fault)
    if len(given := [trigger for trigger in TRIGGERS if trigger in table]) > 1:
        faults.add(where, f"got {' and '.join(given)}, expected one trigger")
    return faults.check(known.get(job, CustomJobSettings), table, where, context={"timezone": timezone})


def _custom_job_faults(job: str, table: dict[str, Any], built_in: Iterable[str]) -> Iterator[str]:
    if not _ID.fullmatch(job):
        yield "got this id, expected lower-case letters, digits and hyphens"
    if "call" in table and "sql" in table:
        yield "got call and sql, expected one of them"
    elif "call" not in table and "sql" not in table:
        yield f"got neither call nor sql, expected one of them or a job of {', '.join(sorted(built_in))}"
    elif "sql" in table:
        yield from (
            f"got {key} beside sql, expected it beside call alone" for key in ("args", "kwargs") if key in table
        )
    if table.keys().isdisjoint(TRIGGERS):
        yield "got no trigger, expected interval, cron or date"
