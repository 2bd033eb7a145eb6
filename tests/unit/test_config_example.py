"""The repository's config.toml: it loads, it is complete, and the defaults that it tells are the real ones."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from catfeeder_cron.config import CustomJobSettings, ProviderSettings, Settings, load
from catfeeder_cron.jobs import built_in
from catfeeder_cron.jobs.check_actions import CheckActions

EXAMPLE = Path(__file__).parents[2] / "config.toml"
JOBS = {job.id: job.settings for job in built_in().values()}


def uncommented() -> str:
    """Return the example with every setting in force. Those that are commented out have no space after the `#`."""
    return re.sub(r"(?m)^#(?=[a-z\[])", "", EXAMPLE.read_text("utf-8"))


@pytest.fixture
def everything(tmp_path: Path) -> Settings:
    (path := tmp_path / "config.toml").write_text(uncommented(), "utf-8")
    return load(path, jobs=JOBS, environ={})


def test_it_loads_as_it_is_with_a_private_postgresql_beside_it() -> None:
    settings = load(EXAMPLE, jobs=JOBS, environ={})
    assert settings.database.conninfo.get_secret_value() == f"embedded:{EXAMPLE.parent}/.data/postgres"
    assert list(settings.jobs) == list(JOBS)


def test_what_is_commented_out_is_the_default_unless_it_is_called_an_example(everything: Settings) -> None:
    as_it_is = load(EXAMPLE, jobs=JOBS, environ={})
    database = {"conninfo": as_it_is.database.conninfo}
    assert everything.database.model_copy(update=database) == as_it_is.database
    assert everything.scheduler == as_it_is.scheduler
    assert everything.logging == as_it_is.logging
    assert everything.oauth.model_copy(update={"providers": {}}) == as_it_is.oauth
    example: dict[str, Any] = {"ping_url": None, "max_rows": None, "timezone": None}
    for job in JOBS:
        changed = {key: value for key, value in example.items() if hasattr(as_it_is.jobs[job], key)}
        assert everything.jobs[job].model_copy(update=changed) == as_it_is.jobs[job]


def test_a_stop_lets_an_attempt_of_an_action_come_to_its_end() -> None:
    settings = load(EXAMPLE, jobs=JOBS, environ={})
    check_actions = settings.jobs["check-actions"]
    assert isinstance(check_actions, CheckActions)
    assert check_actions.action_timeout <= settings.scheduler.shutdown_grace / 2


def test_what_it_gives_as_an_example_is_read(everything: Settings) -> None:
    assert everything.metrics.listen == "127.0.0.1:9464"
    assert everything.actions.webhook.allowed == ("https://hooks.example.org/cats/",)
    assert everything.actions.handlers == {"feed": "feeders.actions:feed"}
    assert everything.oauth.providers["spotify"].client_auth == "basic"
    assert [job for job, its in everything.jobs.items() if isinstance(its, CustomJobSettings)] == [
        "nightly-report",
        "forget-old-news",
    ]


def keys(model: type[BaseModel]) -> set[str]:
    """Collect the keys of a table and of the tables in it."""
    found = set()
    for name, field in model.model_fields.items():
        found.add(field.alias or name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= keys(inner)
    return found


def test_every_key_is_in_it() -> None:
    text = EXAMPLE.read_text("utf-8")
    not_of_the_file = {"path", "warnings"}
    wanted = keys(Settings) | keys(ProviderSettings) | keys(CustomJobSettings)
    for job in JOBS.values():
        wanted |= keys(job)
    missing = {key for key in wanted - not_of_the_file if not re.search(rf"(?m)^#? *{key} = |[\[.]{key}[\].]", text)}
    assert not missing
