"""The tables of config.toml with their keys, types and defaults. The example config.toml explains them."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationInfo, field_validator

from catfeeder_cron.config.durations import Duration, StatementTimeout, within
from catfeeder_cron.config.job_settings import JobSettings
from catfeeder_cron.config.suggestions import nearest
from catfeeder_cron.config.values import (
    Address,
    CallableName,
    Conninfo,
    FileName,
    PostgreSQLName,
    Table,
    URLPrefixes,
    Zone,
)
from catfeeder_cron.errors import ConfigurationError, UnknownJob
from catfeeder_cron.schedule import Schedule

_ONE_SECOND = timedelta(seconds=1)


class DatabaseTables(Table):
    """[database.tables]: the schema and the names of Cat Feeder's tables, unquoted."""

    schema_: PostgreSQLName = Field(default="public", alias="schema")
    connections: PostgreSQLName = "Connections"
    verification: PostgreSQLName = "Verification"
    active_oauths: PostgreSQLName = "ActiveOauths"
    services: PostgreSQLName = "Services"
    user_oauth_connection: PostgreSQLName = "UserOauthConnection"
    actions: PostgreSQLName = "Actions"
    action_log: PostgreSQLName = "ActionLog"
    pet: PostgreSQLName = "Pet"


class DatabaseSettings(Table):
    """[database]. `conninfo` is the key `url`; after loading, it is the address that database_url.resolve found."""

    conninfo: Conninfo = Field(default=SecretStr(""), alias="url")
    url_file: FileName | None = None
    pool_max_size: int = Field(default=8, ge=1)
    connect_timeout: Annotated[Duration, within(_ONE_SECOND)] = timedelta(seconds=10)
    statement_timeout: StatementTimeout = timedelta(seconds=30)
    naive_timestamps: Zone = ZoneInfo("UTC")
    tables: DatabaseTables = DatabaseTables()
    _read_again: Callable[[], str] | None = PrivateAttr(default=None)

    def reading_again(self, read: Callable[[], str] | None) -> "DatabaseSettings":
        """Return a copy whose `conninfo_now` reads the file that the address came from."""
        copy = self.model_copy()
        copy._read_again = read  # noqa: SLF001 - of this class
        return copy

    def conninfo_now(self) -> str:
        """Return the address as the file has it now that it came from; as it was where that file can't be used."""
        before = self.conninfo.get_secret_value()
        try:
            return (self._read_again and self._read_again()) or before
        except ConfigurationError:
            return before

    @property
    def url_file_was_absent(self) -> bool:
        """Whether the address is unknown because its file could not be read."""
        return self.url_file is not None and not self.conninfo.get_secret_value()


class SchedulerSettings(Table):
    """[scheduler]."""

    timezone: Zone = ZoneInfo("UTC")
    max_workers: int = Field(default=4, ge=1)
    shutdown_grace: Duration = timedelta(seconds=60)
    history_keep: Annotated[Duration, within(_ONE_SECOND)] = timedelta(days=30)


class LoggingSettings(Table):
    """[logging]."""

    level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    format: Literal["auto", "journald", "console", "json"] = "auto"


class ProviderSettings(Table):
    """[oauth.providers.NAME]: the differences from the provider's preset. None means the preset's value."""

    client_auth: Literal["basic", "body"] | None = None
    concurrency: int | None = Field(default=None, ge=1)
    refresh_lifetime: Annotated[Duration, within(_ONE_SECOND)] | None = None
    allow_http: bool = False


class OAuthSettings(Table):
    """[oauth]."""

    renew_before: Duration = timedelta(minutes=5)
    concurrency: int = Field(default=32, ge=1)
    request_timeout: Annotated[Duration, within(_ONE_SECOND)] = timedelta(seconds=20)
    lease: Duration = Field(default=timedelta(seconds=120), validate_default=True)
    keep_answers: Duration = timedelta(hours=1)
    providers: dict[str, ProviderSettings] = Field(default_factory=dict)

    @field_validator("lease")
    @classmethod
    def _outlives_the_request(cls, lease: timedelta, info: ValidationInfo) -> timedelta:
        if lease <= info.data.get("request_timeout", timedelta(0)):
            raise ValueError(
                "more than oauth.request_timeout: a lease that ends before the request lets another take it"
            )
        return lease


class WebhookSettings(Table):
    """[actions.webhook]."""

    allowed: URLPrefixes = ()


class ActionHandlerSettings(Table):
    """[actions.KIND]."""

    call: CallableName


class ActionsSettings(Table):
    """[actions]: the table `webhook`, and a table with the handler of every kind that is not built in."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ActionHandlerSettings] = Field(init=False)

    webhook: WebhookSettings = WebhookSettings()

    @property
    def handlers(self) -> dict[str, str]:
        """The handlers as "package.module:function", by kind."""
        return {kind: handler.call for kind, handler in (self.__pydantic_extra__ or {}).items()}


class MetricsSettings(Table):
    """[metrics]."""

    listen: Address | None = None


class Settings(Table):
    """A whole configuration, valid and unchangeable. `path` is the file that it was read from."""

    path: Path
    database: DatabaseSettings
    scheduler: SchedulerSettings
    logging: LoggingSettings
    oauth: OAuthSettings
    actions: ActionsSettings
    metrics: MetricsSettings
    jobs: dict[str, JobSettings]
    warnings: tuple[str, ...] = ()
    """Remarks on the file that are no faults, a line for each."""

    def require_job(self, job_id: str) -> JobSettings:
        """Return the settings of a job. Raises UnknownJob, which names the nearest id."""
        if job_id in self.jobs:
            return self.jobs[job_id]
        raise UnknownJob(f'there is no job "{job_id}"; the nearest is "{nearest(job_id, self.jobs, least=0)}"')

    def schedule(self, job_id: str) -> Schedule:
        """Return the slots of a job. Raises UnknownJob."""
        return self.require_job(job_id).schedule(job_id, self.scheduler.timezone)


SECTIONS = {
    "database": DatabaseSettings,
    "scheduler": SchedulerSettings,
    "logging": LoggingSettings,
    "oauth": OAuthSettings,
    "actions": ActionsSettings,
    "metrics": MetricsSettings,
}
"""The tables of the file other than [jobs], by name."""
