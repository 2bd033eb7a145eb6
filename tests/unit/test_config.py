"""A configuration as a whole: every key, every default, and every fault at once."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from pydantic import Field

from catfeeder_cron.config import CustomJobSettings, Duration, JobSettings, Settings, load
from catfeeder_cron.errors import ConfigurationError
from catfeeder_cron.jobs import built_in

Load = Callable[[str], Settings]


class CleanTokens(JobSettings):
    interval: Duration | None = timedelta(seconds=1800)
    batch_size: int = Field(default=5000, ge=1)


JOBS: dict[str, type[JobSettings]] = {
    "clean-tokens": CleanTokens,
    "check-actions": built_in()["check-actions"].settings,
}


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    def load_text(text: str) -> Settings:
        (path := tmp_path / "config.toml").write_text(text + "\n", "utf-8")
        return load(path, jobs=JOBS, environ={})

    return load_text


@pytest.fixture
def faults_of(load_text: Load, tmp_path: Path) -> Callable[[str], list[str]]:
    def faults_of(text: str) -> list[str]:
        with pytest.raises(ConfigurationError) as caught:
            load_text(text)
        assert caught.value.__cause__ is None, "pydantic's own error shows values"
        prefix = f"{tmp_path}/config.toml: "
        assert all(fault.startswith(prefix) for fault in caught.value.faults)
        return [fault.removeprefix(prefix) for fault in caught.value.faults]

    return faults_of


Faults = Callable[[str], list[str]]


def test_what_the_file_leaves_out_is_the_default(load_text: Load) -> None:
    settings = load_text("[database]")
    assert settings.database.pool_max_size == 8
    assert settings.database.connect_timeout == timedelta(seconds=10)
    assert settings.database.statement_timeout == timedelta(seconds=30)
    assert settings.database.naive_timestamps == ZoneInfo("UTC")
    assert settings.database.tables.schema_ == "public"
    assert settings.scheduler.timezone == ZoneInfo("UTC")
    assert settings.scheduler.shutdown_grace == timedelta(seconds=60)
    assert settings.scheduler.history_keep == timedelta(days=30)
    assert (settings.logging.level, settings.logging.format) == ("info", "auto")
    assert settings.oauth.renew_before == timedelta(minutes=5)
    assert settings.actions.webhook.allowed == ()
    assert settings.metrics.listen is None
    assert settings.jobs["clean-tokens"] == CleanTokens()


def test_what_the_file_says_holds(load_text: Load) -> None:
    settings = load_text("""
        [database.tables]
        schema = "cats"
        [oauth.providers."my provider"]
        client_auth = "basic"
        allow_http = true
        [actions.webhook]
        allowed = ["https://hooks.example.org/cats/"]
        [actions.mail]
        call = "post.office:send"
        [metrics]
        listen = "[::1]:9464"
        [jobs.clean-tokens]
        interval = "10m"
        batch_size = 7
    """)
    assert settings.database.tables.schema_ == "cats"
    assert settings.oauth.providers["my provider"].client_auth == "basic"
    assert settings.actions.webhook.allowed == ("https://hooks.example.org/cats/",)
    assert settings.actions.handlers == {"mail": "post.office:send"}
    assert settings.metrics.listen == "[::1]:9464"
    assert settings.jobs["clean-tokens"] == CleanTokens(interval=timedelta(minutes=10), batch_size=7)


def test_settings_are_final(load_text: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_text("[database]").scheduler.max_workers = 5


def test_all_faults_of_a_file_are_told_at_once(faults_of: Faults) -> None:
    assert faults_of("""
        [databse]
        [database]
        url = "hunter2"
        url_file = "hunter2"
        pool_max_size = 0
        [scheduler]
        timezone = "Europe/Pris"
        max_worker = 3
        [jobs.clean-tokens]
        interval = 0
        cron = "* * * * *"
        batch_sise = 5
        enabled = 1
        [jobs.clean-token]
        enabled = false
    """) == [
        "databse: unknown key; did you mean `database`?",
        'database.url: got text, expected "postgresql://...", "embedded:PATH", '
        'or pairs such as "host=/run/postgresql dbname=catfeeder"',
        "database.pool_max_size: got 0, expected at least 1",
        'scheduler.timezone: got "Europe/Pris", expected a time zone such as "UTC" or "Europe/Paris"; '
        "did you mean `Europe/Paris`?",
        "scheduler.max_worker: unknown key; did you mean `max_workers`?",
        "database.url_file: got it beside url, expected one of the two",
        "jobs.clean-tokens: got interval and cron, expected one trigger",
        "jobs.clean-tokens.enabled: got 1, expected true or false",
        "jobs.clean-tokens.interval: got 0, expected at least 1s",
        "jobs.clean-tokens.batch_sise: unknown key; did you mean `batch_size`?",
        "jobs.clean-token: unknown job; did you mean `clean-tokens`? A job of your own needs call or sql",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("databases = 5", "databases: unknown key; did you mean `database`?"),
        ("database = 5", "database: got 5, expected a table"),
        ('database = "dbname=x"', "database: got text, expected a table"),
        ("jobs = []", "jobs: got a list, expected a table for each job"),
        ("zzz = 5", "zzz: unknown key, expected one of Crons, actions, database, jobs, logging, metrics, "),
        ("[database]\nconninfo = 'x'", "database.conninfo: unknown key, expected one of connect_timeout, "),
        ("[database]\npool_max_size = true", "database.pool_max_size: got true, expected a whole number"),
        ("[database]\npool_max_size = 8.0", "database.pool_max_size: got 8.0, expected a whole number"),
        ("[database]\npool_max_size = '8'", 'database.pool_max_size: got "8", expected a whole number'),
        ("[database]\nstatement_timeout = 0", "database.statement_timeout: got 0, expected at least 0.001s"),
        ("[database]\nstatement_timeout = '25d'", 'database.statement_timeout: got "25d", expected at most 24d'),
        (
            "[database]\nnaive_timestamps = 'Europe/Pris'",
            'database.naive_timestamps: got "Europe/Pris", expected a time zone such as "UTC" or "Europe/Paris"; '
            "did you mean `Europe/Paris`?",
        ),
        ("[database]\nconnect_timeout = 0.5", "database.connect_timeout: got 0.5, expected at least 1s"),
        (
            "[database]\nconnect_timeout = '10'",
            'database.connect_timeout: got "10", expected a duration: seconds, or text such as',
        ),
        ("[database.tables]\nschema = ''", 'database.tables.schema: got "", expected a name of 1 to 63 bytes'),
        (
            f"[database.tables]\npet = '{'é' * 32}'",
            'database.tables.pet: got "éééééééééééééééééééééééééééééééé", expected a name of 1 to 63 bytes',
        ),
        (
            "[scheduler]\ntimezone = 'europe/pari'",
            'scheduler.timezone: got "europe/pari", expected a time zone such as "UTC" or "Europe/Paris"; '
            "did you mean `Europe/Paris`?",
        ),
        ("[scheduler]\ntimezone = 1", "scheduler.timezone: got 1, expected a time zone"),
        ("[scheduler]\ntimezone = '../etc/passwd'", "scheduler.timezone: got text, expected a time zone"),
        ("[scheduler]\ntimezone = 'Europe'", 'scheduler.timezone: got "Europe", expected a time zone'),
        ("[scheduler]\nshutdown_grace = -1", "scheduler.shutdown_grace: got -1, expected a duration"),
        (
            "[scheduler]\nmax_workers = 2026-12-24T06:00:00Z",
            "scheduler.max_workers: got 2026-12-24T06:00:00+00:00, expected a whole number",
        ),
        ("[scheduler]\nmax_workers = 06:00:00", "scheduler.max_workers: got a time of day, expected a whole number"),
        (
            "[logging]\nlevel = 'INFO'",
            'logging.level: got "INFO", expected "debug", "info", "warning", "error" or "critical"',
        ),
        ("[oauth]\nlease = 20", "oauth.lease: got 20, expected more than oauth.request_timeout"),
        ("[oauth]\nrequest_timeout = '2m'", "oauth.lease: got 2m, expected more than oauth.request_timeout"),
        ("[oauth.providers.\"my one\"]\nclientauth = ''", 'oauth.providers."my one".clientauth: unknown key; did you'),
        ("[oauth.providers]\nspotify = 1", "oauth.providers.spotify: got 1, expected a table"),
        ("[actions.webhook]\nallowed = 'https://x/'", "actions.webhook.allowed: got text, expected a list"),
        ("[actions.webhook]\nallowed = ['https://x/', 4]", "actions.webhook.allowed[1]: got 4, expected text"),
        (
            "[actions.webhook]\nallowed = ['ftp://x/']",
            "actions.webhook.allowed[0]: got text, expected an origin and a path",
        ),
        (
            "[actions.webhook]\nallowed = ['https://x/?a']",
            'actions.webhook.allowed[0]: got text, expected an origin and a path, "https://host/path/", without',
        ),
        (
            "[actions.webhook]\nallowed = ['https://x:0x/']",
            "actions.webhook.allowed[0]: got text, expected an origin and a path",
        ),
        ("[actions.mail]\ncall = 'x.y'", 'actions.mail.call: got "x.y", expected "package.module:function"'),
        ("[metrics]\nlisten = ':9464'", 'metrics.listen: got ":9464", expected "host:port"'),
        ("[metrics]\nlisten = '::1:9464'", 'metrics.listen: got "::1:9464", expected "host:port"'),
        ("[metrics]\nlisten = 'localhost:65536'", 'metrics.listen: got "localhost:65536", expected "host:port"'),
        ("[jobs.clean-tokens]\ninterval = true", "jobs.clean-tokens.interval: got true, expected a duration"),
        ("[jobs.clean-tokens]\ninterval = 0.5", "jobs.clean-tokens.interval: got 0.5, expected at least 1s"),
        (
            "[jobs.clean-tokens]\ncron = '61 * * * *'",
            'jobs.clean-tokens.cron: got "61 * * * *", expected a cron expression as in crontab(5): ',
        ),
        ("[jobs.clean-tokens]\ncron = 5", "jobs.clean-tokens.cron: got 5, expected text"),
        ("[jobs.clean-tokens]\ndate = 2026-12-24", "jobs.clean-tokens.date: got a date, expected a date with a time"),
        (
            "[jobs.clean-tokens]\ndate = 0001-01-01T00:00:00+05:00",
            "jobs.clean-tokens.date: got 0001-01-01T00:00:00+05:00, expected a date between the years 1 and 9999",
        ),
        (
            "[jobs.clean-tokens]\njitter = 900",
            "jobs.clean-tokens.jitter: got 900, expected less than half the interval, which is 30m",
        ),
        ("[jobs.clean-tokens]\ntimeout = 0", "jobs.clean-tokens.timeout: got 0, expected at least 0.001s"),
        ("[jobs.clean-tokens]\ncall = 'x:y'", "jobs.clean-tokens.call: unknown key, expected one of batch_size, "),
        (
            "[jobs.check-actions]\nenabled = false",
            "jobs.check-actions.enabled: got false, expected true: this job is always enabled",
        ),
        ("[jobs.renew-oauth]\ninterval = 0", "jobs.renew-oauth.interval: got 0, expected at least 1s"),
        ("[jobs]\nclean-tokens = 5", "jobs.clean-tokens: got a number, expected a table"),
        ("[jobs]\nx = []", "jobs.x: got a list, expected a table"),
        (
            "[jobs.clean_tokens]\nenabled = false",
            "jobs.clean_tokens: unknown job; did you mean `clean-tokens`? A job of your own needs call or sql",
        ),
        (
            "[jobs.x]\ninterval = 5",
            "jobs.x: got neither call nor sql, expected one of them or a job of check-actions, ",
        ),
        ("[jobs.x]\nsql = 'SELECT 1'", "jobs.x: got no trigger, expected interval, cron or date"),
        ("[jobs.x]\nsql = 'x'\ninterval = 5\nretries = -1", "jobs.x.retries: got -1, expected"),
        ("[jobs.x]\nsql = 'x'\ninterval = 5\nretry_after = 0", "jobs.x.retry_after: got 0, expected at least 1s"),
        ("[jobs.clean-tokens]\nretries = 1", "jobs.clean-tokens.retries: unknown key"),
        ("[jobs.x]\nsql = ' '\ninterval = 5", 'jobs.x.sql: got " ", expected an SQL statement'),
        ("[jobs.x]\nsql = 'SELECT 1'\ncall = 'a:b'\ninterval = 5", "jobs.x: got call and sql, expected one of them"),
        ("[jobs.x]\nsql = 'SELECT 1'\nargs = []\ninterval = 5", "jobs.x: got args beside sql"),
        ("[jobs.x]\ncall = 'a:b'\nargs = 'c'\ninterval = 5", "jobs.x.args: got text, expected a list"),
        ("[jobs.x]\ncall = 'a:b'\nkwargs = 5\ninterval = 5", "jobs.x.kwargs: got 5, expected a table"),
        ("[jobs.x]\ncall = 'a:b'\nscale = 5\ninterval = 5", "jobs.x.scale: unknown key; did you mean `call`?"),
        (
            "[jobs.\"My job\"]\nsql = 'SELECT 1'\ninterval = 5",
            'jobs."My job": got this id, expected lower-case letters',
        ),
        ("[jobs.\"\\n\\u001b\"]\nsql = 'SELECT 1'\ninterval = 5", 'jobs."\\n\\u001b": got this id'),
    ],
)
def test_a_fault_names_the_key_what_it_got_and_what_it_expects(faults_of: Faults, text: str, fault: str) -> None:
    assert [found for found in faults_of(text) if found.startswith(fault)]


def test_a_handler_needs_its_function(faults_of: Faults) -> None:
    assert faults_of("[actions.mail]\ncal = 'post.office:send'") == [
        "actions.mail.call: missing, and it has no default",
        "actions.mail.cal: unknown key; did you mean `call`?",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[database]\nurl = "mysql://cat:hunter2@db"',
        '[database]\nurl = ["hunter2"]',
        '[database]\nurl = "embedded:"\nurl_file = "hunter2"',
        '[database]\nurl_file = "postgresql://cat:hunter2@db"',
        '[database]\npool_max_size = "postgresql://cat:hunter2@db"',
        '[database]\nconnect_timeout = "host=db password=hunter2"',
        '[database]\npassword = "hunter2"',
        'database = "host=db user=cat hunter2"',
        '[jobs.clean-tokens]\nping_url = "hunter2"',
        '[jobs.clean-tokens]\nping_url = "ftp://ping/hunter2"',
        '[oauth.providers.google]\nclient_secret = "hunter2"',
        '[actions.webhook]\nallowed = ["https://cat:hunter2@hooks/"]',
        '[actions.webhook]\nallowed = "hunter2"',
    ],
)
def test_a_fault_never_shows_a_secret(faults_of: Faults, text: str) -> None:
    assert "hunter2" not in "\n".join(faults_of(text))


def test_secrets_are_not_shown_with_the_settings(load_text: Load) -> None:
    settings = load_text(
        '[database]\nurl = "postgresql://cat:hunter2@db"\n[jobs.clean-tokens]\nping_url = "https://ping/hunter2"'
    )
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()
    ping_url = settings.jobs["clean-tokens"].ping_url
    assert ping_url is not None
    assert ping_url.get_secret_value() == "https://ping/hunter2"


def test_long_and_unprintable_values_are_not_repeated(faults_of: Faults) -> None:
    [fault] = faults_of(f"[logging]\nlevel = '{'x' * 1000}'")
    assert "got text" in fault
    [fault] = faults_of('[logging]\nlevel = "\\u001b[2J"')
    assert r'got "\u001b[2J"' in fault
    [fault] = faults_of(f"[jobs.clean-tokens]\nenabled = 0x{'f' * 5000}")
    assert "got a number, expected true or false" in fault


# Jobs


def test_known_jobs_come_first_then_custom_ones_in_the_order_of_the_file(load_text: Load) -> None:
    settings = load_text("""
        [jobs]
        zebra = { sql = "SELECT 1", interval = 5 }
        check-actions = { interval = 300 }
        ant = { call = "a:b", args = [1, "x"], kwargs = { days = 1 }, cron = "0 6 * * *" }
    """)
    assert list(settings.jobs) == ["clean-tokens", "check-actions", "zebra", "ant"]
    ant = settings.jobs["ant"]
    assert isinstance(ant, CustomJobSettings)
    assert (ant.call, ant.args, ant.kwargs, ant.sql) == ("a:b", (1, "x"), {"days": 1}, None)


@pytest.mark.parametrize("trigger", ['cron = "0 6 * * *"', "date = 2026-12-24T06:00:00Z"])
def test_another_trigger_takes_the_place_of_the_default_interval(load_text: Load, trigger: str) -> None:
    job = load_text(f"[jobs.clean-tokens]\n{trigger}\njitter = '1h'").jobs["clean-tokens"]
    assert job.interval is None
    assert (job.cron is None) != (job.date is None)


@pytest.mark.parametrize(
    ("text", "hour"),
    [
        ("date = 2026-12-24T06:00:00Z", 6),
        ("date = 2026-12-24T06:00:00+01:00", 5),
        ("date = 2026-12-24T06:00:00", 11),
        ("date = 2026-12-24T06:00:00\ntimezone = 'Europe/Paris'", 5),
    ],
)
def test_a_date_without_offset_is_one_of_the_jobs_zone_else_the_schedulers(
    load_text: Load, text: str, hour: int
) -> None:
    settings = load_text(f"[scheduler]\ntimezone = 'America/New_York'\n[jobs.clean-tokens]\n{text}")
    assert settings.jobs["clean-tokens"].date == datetime(2026, 12, 24, hour, tzinfo=UTC)
