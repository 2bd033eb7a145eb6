"""Read the web server's config.toml, whose [Crons] section sets `enabled` and `interval` of the built-in jobs.

The section belongs to the web server, so an unknown key, which its next release may add, is only a warning.
"""

from collections.abc import Container, Mapping
from typing import Any

from pydantic import create_model

from catfeeder_cron.config.durations import Interval
from catfeeder_cron.config.faults import Faults
from catfeeder_cron.config.job_settings import TRIGGERS, JobSettings
from catfeeder_cron.config.values import Table

_TYPES: dict[str, Any] = {"enabled": (bool, False), "interval": (Interval | None, None)}
_TWO_SPELLINGS = ("test_cron_interval", "test_crons_interval")


def translate(
    document: dict[str, Any], ours: Container[str], jobs: Mapping[str, type[JobSettings]], faults: Faults
) -> dict[str, Any]:
    """Return the document with its [Crons] translated to [jobs.ID], and without the keys that are not in `ours`.

    The settings classes in `jobs` name their keys of [Crons]. A document without [Crons] is returned unchanged. An
    option that is set in both ways is a fault, an unknown key is a warning.
    """
    if "Crons" not in document:
        return document
    translated = {key: value for key, value in document.items() if key in ours}
    options = {key: option for job in jobs.values() for key, option in job.web_server_keys.items()}
    crons = _known(document["Crons"], options, faults)
    section = create_model("_Crons", __base__=Table, **{key: _TYPES[option] for key, option in options.items()})
    valid = faults.check(section, crons, ("Crons",))
    tables = translated.setdefault("jobs", {})
    if not isinstance(crons, dict) or not isinstance(tables, dict):
        return translated
    if crons.keys() >= {*_TWO_SPELLINGS}:
        first, second = _TWO_SPELLINGS
        faults.add(("Crons", second), f"got it beside {first}, expected one of the two")
        del crons[second]
    for job_id, job in jobs.items():
        given = {key: option for key, option in job.web_server_keys.items() if key in crons}
        table = tables.setdefault(job_id, {}) if given else None
        if isinstance(table, dict):
            _translate_job(job_id, table, given, valid, faults)
            # The web server always runs a job for which it has no switch, so setting the interval enables the job.
            if "enabled" not in job.web_server_keys.values():
                table.setdefault("enabled", True)
    return translated


def _translate_job(
    job_id: str, table: dict[str, Any], given: Mapping[str, str], valid: Table | None, faults: Faults
) -> None:
    for key, option in given.items():
        rivals = TRIGGERS if option == "interval" else (option,)
        if rival := next((rival for rival in rivals if rival in table), None):
            faults.add(("jobs", job_id, rival), f"got it beside Crons.{key}, expected one of the two")
        elif valid is not None:
            table[option] = getattr(valid, key)


def _known(crons: object, options: Mapping[str, str], faults: Faults) -> object:
    """Return the section without its unknown keys, and add a warning for each."""
    if not isinstance(crons, dict):
        return crons
    for key in [key for key in crons if key not in options]:
        faults.ignore(("Crons", key), options)
    return {key: value for key, value in crons.items() if key in options}
