"""The web server's own config.toml: its [Crons] section sets `enabled` and `interval` of the same jobs.

The section is the web server's: a key that its next release adds is passed over with a warning.
"""

from collections.abc import Container
from typing import Any

from pydantic import create_model

from catfeeder_cron.config.durations import Interval
from catfeeder_cron.config.faults import Faults
from catfeeder_cron.config.job_settings import TRIGGERS
from catfeeder_cron.config.values import Table

_TEST_JOBS = ("test-hello-world", "test-current-date")
_SETS = {
    "clean_tokens": ("enabled", ("clean-tokens",)),
    "clean_tokens_interval": ("interval", ("clean-tokens",)),
    "clean_verification": ("enabled", ("clean-verification",)),
    "clean_verification_interval": ("interval", ("clean-verification",)),
    "renew_oath_tokens": ("enabled", ("renew-oauth",)),
    "renew_oath_tokens_interval": ("interval", ("renew-oauth",)),
    "enable_test_crons": ("enabled", _TEST_JOBS),
    "test_cron_interval": ("interval", _TEST_JOBS),
    "test_crons_interval": ("interval", _TEST_JOBS),
    "check_actions_interval": ("interval", ("check-actions",)),
    "reset_food_counters_interval": ("interval", ("reset-food-counters",)),
}
# The web server has no switch for this job: it always runs there, and whoever sets its interval expects it to run.
_ALSO_ENABLES = "reset_food_counters_interval"
_TYPES: dict[str, Any] = {"enabled": (bool, False), "interval": (Interval | None, None)}
_Crons = create_model("_Crons", __base__=Table, **{key: _TYPES[option] for key, (option, _) in _SETS.items()})


def translate(document: dict[str, Any], ours: Container[str], faults: Faults) -> dict[str, Any]:
    """Return the document with its [Crons] written as [jobs.ID], and without what is not `ours`.

    A document without [Crons] is returned as it is. What is set both ways is a fault, an unknown key a warning.
    """
    if "Crons" not in document:
        return document
    translated = {key: value for key, value in document.items() if key in ours}
    crons = _known(document["Crons"], faults)
    valid = faults.check(_Crons, crons, ("Crons",))
    jobs = translated.setdefault("jobs", {})
    if not isinstance(crons, dict) or not isinstance(jobs, dict):
        return translated
    if {"test_cron_interval", "test_crons_interval"} <= crons.keys():
        faults.add(("Crons", "test_crons_interval"), "got it beside test_cron_interval, expected one of the two")
        crons = {key: value for key, value in crons.items() if key != "test_crons_interval"}
    for key, (option, ids) in _SETS.items():
        for job in ids if key in crons else ():
            table = jobs.setdefault(job, {})
            if not isinstance(table, dict):
                continue
            rivals = TRIGGERS if option == "interval" else (option,)
            if rival := next((rival for rival in rivals if rival in table), None):
                faults.add(("jobs", job, rival), f"got it beside Crons.{key}, expected one of the two")
            elif valid is not None:
                table[option] = getattr(valid, key)
            if key == _ALSO_ENABLES:
                table.setdefault("enabled", True)
    return translated


def _known(crons: object, faults: Faults) -> object:
    """Return the section without the keys that are not known, each of which is a warning."""
    if not isinstance(crons, dict):
        return crons
    for key in [key for key in crons if key not in _SETS]:
        faults.ignore(("Crons", key), _SETS)
    return {key: value for key, value in crons.items() if key in _SETS}
