"""Whole configurations, made up: what is right is read as it was meant, and nothing else ever happens than a fault."""

import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catfeeder_cron.config import CustomJobSettings, Duration, JobSettings, load
from catfeeder_cron.errors import ConfigurationError


class CleanTokens(JobSettings):
    interval: Duration | None = timedelta(seconds=1800)


JOBS: dict[str, type[JobSettings]] = {"clean-tokens": CleanTokens}
SECRET = "hunter2"

# The names that mean something somewhere, so that made-up documents come near to real ones.
WORDS = """
    database url url_file pool_max_size connect_timeout tables schema pet scheduler timezone max_workers logging
    level format oauth lease request_timeout providers spotify client_auth actions webhook allowed metrics listen
    jobs clean-tokens clean-token check-actions x enabled interval cron date jitter ping_url call args kwargs sql
    Crons clean_tokens clean_tokens_interval test_cron_interval test_crons_interval
"""
KEYS = st.sampled_from(WORDS.split())
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=20)
VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.sampled_from(["30m", "info", "Europe/Paris", "* * * * *", "a:b", "basic", "embedded:x", "127.0.0.1:1"])
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.dates()
    | st.times(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(KEYS | TEXTS, values, max_size=5),
    max_leaves=10,
)
SECTIONS = st.sampled_from(["database", "scheduler", "logging", "oauth", "actions", "metrics", "jobs", "Crons"])
DOCUMENTS = st.dictionaries(SECTIONS | KEYS | TEXTS, st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, max_size=5)

durations = st.timedeltas(timedelta(seconds=1), timedelta(days=24)).map(
    lambda duration: timedelta(seconds=duration // timedelta(seconds=1))
)


def toml(value: object) -> str:
    """Write a value as TOML does."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return f'"{value // timedelta(seconds=1)}s"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return str(value)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.toml"


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text("# made up\n" + "".join(f"{toml(key)} = {toml(value)}\n" for key, value in document.items()))


@given(document=DOCUMENTS)
def test_any_document_is_read_or_refused_in_single_lines_that_name_the_file(
    path: Path, document: dict[str, Any]
) -> None:
    write(path, document)
    faults: Sequence[str] = [f"{path}: none"]
    try:
        load(path, jobs=JOBS, environ={})
    except ConfigurationError as error:
        faults = error.faults
    assert faults
    assert all(fault.startswith(f"{path}: ") and fault.isprintable() for fault in faults)


@given(
    numbers=st.fixed_dictionaries({}, optional={"max_workers": st.integers(1, 1000)}),
    scheduler=st.fixed_dictionaries({}, optional={"shutdown_grace": durations, "history_keep": durations}),
    database=st.fixed_dictionaries(
        {},
        optional={"pool_max_size": st.integers(1, 1000), "statement_timeout": durations, "connect_timeout": durations},
    ),
    job=st.fixed_dictionaries({}, optional={"enabled": st.booleans(), "timeout": durations, "catch_up": st.booleans()}),
    trigger=st.one_of(
        durations.map(lambda interval: {"interval": interval}),
        st.just({"cron": "15 3 * * mon-fri"}),
        st.datetimes(timezones=st.just(UTC)).map(lambda instant: {"date": instant}),
    ),
    custom=st.dictionaries(
        st.from_regex(r"my-[a-z0-9-]{1,20}", fullmatch=True), st.lists(st.integers(-9, 9) | TEXTS), max_size=3
    ),
)
def test_a_valid_document_is_read_as_it_was_written(
    path: Path,
    numbers: dict[str, Any],
    scheduler: dict[str, Any],
    database: dict[str, Any],
    job: dict[str, Any],
    trigger: dict[str, Any],
    custom: dict[str, list[Any]],
) -> None:
    job, scheduler = {**job, **trigger}, {**scheduler, **numbers}
    customs = {name: {"call": "a.b:c", "args": args, "cron": "0 * * * *"} for name, args in custom.items()}
    write(path, {"database": database, "scheduler": scheduler, "jobs": {"clean-tokens": job, **customs}})

    settings = load(path, jobs=JOBS, environ={})

    for section, written in (
        (settings.database, database),
        (settings.scheduler, scheduler),
        (settings.jobs["clean-tokens"], {**dict.fromkeys(("interval", "cron", "date")), **job}),
    ):
        assert {key: getattr(section, key) for key in written} == written
    assert list(settings.jobs) == ["clean-tokens", *custom]
    for name, args in custom.items():
        assert settings.jobs[name] == CustomJobSettings(call="a.b:c", args=tuple(args), cron="0 * * * *")


@given(
    key=st.sampled_from([("database", "url"), ("database", "password"), ("jobs", "clean-tokens", "ping_url")]),
    value=st.recursive(
        st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=5).map(lambda text: text + SECRET),
        lambda values: st.lists(values, min_size=1, max_size=2) | st.dictionaries(KEYS, values, min_size=1, max_size=2),
        max_leaves=3,
    ),
    rest=DOCUMENTS,
)
def test_no_secret_is_ever_shown(path: Path, key: tuple[str, ...], value: object, rest: dict[str, Any]) -> None:
    document: Any = value
    for part in reversed(key):
        document = {part: document}
    write(path, {**rest, **document})
    try:
        shown = repr(load(path, jobs=JOBS, environ={}))
    except ConfigurationError as error:
        shown = str(error)
    assert SECRET not in shown
