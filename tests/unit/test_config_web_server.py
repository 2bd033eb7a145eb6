"""The web server's own config.toml serves: its [Crons] section sets the same jobs."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from catfeeder_cron.config import Duration, JobSettings, Settings, load
from catfeeder_cron.errors import ConfigurationError
from catfeeder_cron.jobs import built_in

Load = Callable[[str], Settings]


def half_hourly(job: type[JobSettings]) -> type[JobSettings]:
    """Return the settings of a job that only has the job's keys in the web server's section."""

    class HalfHourly(JobSettings):
        web_server_keys = job.web_server_keys
        interval: Duration | None = timedelta(seconds=1800)

    return HalfHourly


JOBS = {job_id: half_hourly(job.settings) for job_id, job in built_in().items()}


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    def load_text(text: str) -> Settings:
        (path := tmp_path / "config.toml").write_text(text)
        return load(path, jobs=JOBS, environ={})

    return load_text


def faults_of(load_text: Load, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_text(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "jobs"),
    [
        ("clean_tokens", ["clean-tokens"]),
        ("clean_verification", ["clean-verification"]),
        ("renew_oath_tokens", ["renew-oauth"]),
        ("enable_test_crons", ["test-hello-world", "test-current-date"]),
    ],
)
def test_a_switch_enables_and_disables_its_jobs_alone(load_text: Load, key: str, jobs: list[str]) -> None:
    settings = load_text(f"[Crons]\n{key} = false\n")
    assert [job for job, its in settings.jobs.items() if not its.enabled] == [job for job in JOBS if job in jobs]
    assert all(its.enabled for its in load_text(f"[Crons]\n{key} = true\n").jobs.values())


@pytest.mark.parametrize(
    ("key", "jobs"),
    [
        ("clean_tokens_interval", ["clean-tokens"]),
        ("clean_verification_interval", ["clean-verification"]),
        ("renew_oath_tokens_interval", ["renew-oauth"]),
        ("test_cron_interval", ["test-hello-world", "test-current-date"]),
        ("test_crons_interval", ["test-hello-world", "test-current-date"]),
        ("check_actions_interval", ["check-actions"]),
        ("reset_food_counters_interval", ["reset-food-counters"]),
    ],
)
def test_an_interval_is_that_of_its_jobs_alone(load_text: Load, key: str, jobs: list[str]) -> None:
    settings = load_text(f"[Crons]\n{key} = 77\n")
    changed = [job for job, its in settings.jobs.items() if its.interval == timedelta(seconds=77)]
    assert changed == [job for job in JOBS if job in jobs]


def test_the_web_servers_other_sections_are_passed_over_and_ours_are_read(load_text: Load) -> None:
    settings = load_text(
        'host = "0.0.0.0"\n[Server]\nport = 80\n[Crons]\nclean_tokens = false\n'
        "[jobs.clean-tokens]\ntimeout = 5\n[scheduler]\nmax_workers = 2\n"
    )
    assert settings.scheduler.max_workers == 2
    assert not settings.jobs["clean-tokens"].enabled
    assert settings.jobs["clean-tokens"].timeout == timedelta(seconds=5)


def test_without_it_a_section_that_is_not_known_is_a_fault(load_text: Load) -> None:
    assert "config.toml: crons: unknown key; did you mean `Crons`?" in faults_of(load_text, "[crons]\nx = 1\n")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("clean_tokens = 1", "Crons.clean_tokens: got 1, expected true or false"),
        ("clean_tokens_interval = 0", "Crons.clean_tokens_interval: got 0, expected at least 1s"),
        ("clean_tokens_interval = true", "Crons.clean_tokens_interval: got true, expected a duration"),
        (
            "test_cron_interval = 5\ntest_crons_interval = 5",
            "Crons.test_crons_interval: got it beside test_cron_interval, expected one of the two",
        ),
        (
            "clean_tokens = true\n[jobs.clean-tokens]\nenabled = true",
            "jobs.clean-tokens.enabled: got it beside Crons.clean_tokens, expected one of the two",
        ),
        (
            "reset_food_counters_interval = 9\n[jobs.reset-food-counters]\ninterval = 9",
            "jobs.reset-food-counters.interval: got it beside Crons.reset_food_counters_interval, expected one of the",
        ),
        (
            'test_cron_interval = 9\n[jobs.test-current-date]\ncron = "0 0 * * *"',
            "jobs.test-current-date.cron: got it beside Crons.test_cron_interval, expected one of the two",
        ),
        (
            "clean_tokens_interval = 20\n[jobs.clean-tokens]\njitter = 10",
            "jobs.clean-tokens.jitter: got 10, expected less than half the interval, which is 20s",
        ),
        ("[jobs]\nclean-tokens = 5", "jobs.clean-tokens: got a number, expected a table"),
    ],
)
def test_what_is_wrong_in_it_is_told(load_text: Load, text: str, fault: str) -> None:
    [line] = faults_of(load_text, f"[Crons]\n{text}\n").splitlines()
    assert fault in line


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("clean_token", "; did you mean `clean_tokens`?"),
        ("check_actions", "; did you mean `check_actions_interval`?"),
        ("prune_photos_weekly", ""),
    ],
)
def test_a_key_that_a_newer_web_server_may_have_added_is_a_warning(load_text: Load, key: str, meant: str) -> None:
    settings = load_text(f"[Crons]\n{key} = {{ any = 'value' }}\nclean_tokens_interval = 77\n")
    assert settings.jobs["clean-tokens"].interval == timedelta(seconds=77), "the other keys are in force"
    [warning] = settings.warnings
    assert warning.endswith(f"config.toml: Crons.{key}: unknown key, which has no effect{meant}")


def test_a_file_without_anything_unknown_gives_no_warning(load_text: Load) -> None:
    assert load_text("[Crons]\nclean_tokens = true\n").warnings == ()
    assert load_text("[jobs.clean-tokens]\nenabled = true\n").warnings == ()


@pytest.mark.parametrize(
    ("rest", "enabled"),
    [
        ("", True),
        ("[jobs.reset-food-counters]\nenabled = false", False),
        ("[jobs.reset-food-counters]\njitter = 1", True),
    ],
)
def test_the_interval_of_the_job_that_always_runs_in_the_web_server_enables_it_here(
    tmp_path: Path, rest: str, enabled: bool
) -> None:
    (path := tmp_path / "config.toml").write_text(f"[Crons]\nreset_food_counters_interval = 86400\n{rest}\n")
    jobs = {job.id: job.settings for job in built_in().values()}
    assert not jobs["reset-food-counters"]().enabled, "by itself"
    settings = load(path, jobs=jobs, environ={}).jobs["reset-food-counters"]
    assert (settings.enabled, settings.interval) == (enabled, timedelta(days=1))


def test_it_must_be_a_table(load_text: Load) -> None:
    assert "Crons: got 5, expected a table" in faults_of(load_text, "Crons = 5\n")
    assert "jobs: got a number, expected a table for each job" in faults_of(
        load_text, "jobs = 5\n[Crons]\nclean_tokens = true\n"
    )
