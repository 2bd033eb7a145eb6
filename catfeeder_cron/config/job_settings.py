"""The settings of a job: the keys that every job has, and those of a custom job, which only exists in config.toml."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Annotated, Any, ClassVar
from zoneinfo import ZoneInfo

from pydantic import Field, ValidationInfo, field_validator, model_validator

from catfeeder_cron.config.durations import Duration, StatementTimeout, within
from catfeeder_cron.config.values import CallableName, PingURL, Table, Zone
from catfeeder_cron.errors import ConfigurationError
from catfeeder_cron.schedule import CronSchedule, DateSchedule, IntervalSchedule, Schedule
from catfeeder_cron.schedule.crontab import Crontab
from catfeeder_cron.times import format_duration

TRIGGERS = ("interval", "cron", "date")


class JobSettings(Table):
    """[jobs.ID]. A built-in job has a subclass with its own options and its default interval.

    At most one of `interval`, `cron` and `date` is not None; `date` is in UTC. A `timezone` of None means the
    scheduler's. The validation context may hold the scheduler's timezone, for a `date` without an offset.
    """

    web_server_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The option that each key of [Crons], the web server's section, sets for the job."""

    enabled: bool = True
    interval: Duration | None = None
    cron: str | None = None
    timezone: Zone | None = None
    date: datetime | None = None
    timeout: StatementTimeout = timedelta(seconds=600)
    jitter: Duration = Field(default=timedelta(0), validate_default=True)
    catch_up: bool = True
    ping_url: PingURL | None = None

    def schedule(self, job_id: str, default_zone: ZoneInfo) -> Schedule:
        """Return the job's slots, in `default_zone` if the job has no timezone.

        Raises ConfigurationError when the job has no trigger.
        """
        if self.interval is not None:
            return IntervalSchedule(self.interval, job_id)
        if self.cron is not None:
            return CronSchedule(Crontab.parse(self.cron), self.timezone or default_zone)
        if self.date is not None:
            return DateSchedule(self.date)
        raise ConfigurationError(f"jobs.{job_id}: got no trigger, expected interval, cron or date")

    @model_validator(mode="before")
    @classmethod
    def _another_trigger_replaces_the_default_interval(cls, table: Any) -> Any:
        if isinstance(table, dict) and not table.keys().isdisjoint(("cron", "date")):
            return {"interval": None, **table}
        return table

    @field_validator("interval")
    @classmethod
    def _bounded(cls, interval: timedelta | None) -> timedelta | None:
        if interval is not None and interval < timedelta(seconds=1):
            raise ValueError("at least 1s")
        return interval

    @field_validator("cron")
    @classmethod
    def _readable(cls, cron: str | None) -> str | None:
        if cron is not None:
            try:
                Crontab.parse(cron)
            except ValueError as error:
                raise ValueError(f"a cron expression as in crontab(5): {error}") from None
        return cron

    @field_validator("date")
    @classmethod
    def _in_utc(cls, date: datetime | None, info: ValidationInfo) -> datetime | None:
        if date is None:
            return None
        if date.tzinfo is None:
            zone = info.data.get("timezone") or (info.context or {}).get("timezone", UTC)
            date = date.replace(tzinfo=zone)
        try:
            return date.astimezone(UTC)
        except OverflowError:
            raise ValueError("a date between the years 1 and 9999") from None

    @field_validator("jitter")
    @classmethod
    def _less_than_half_the_interval(cls, jitter: timedelta, info: ValidationInfo) -> timedelta:
        interval = info.data.get("interval")
        if interval is not None and jitter * 2 >= interval:
            raise ValueError(f"less than half the interval, which is {format_duration(interval)}")
        return jitter


class CustomJobSettings(JobSettings):
    """A custom job, which only exists in config.toml: a Python function (`call`) or one SQL statement (`sql`)."""

    call: CallableName | None = None
    args: tuple[Any, ...] = Field(default=(), strict=False)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    sql: str | None = None
    retries: int = Field(default=0, ge=0, le=100)
    """How often a run that failed or timed out is repeated before the next slot."""
    retry_after: Annotated[Duration, within(timedelta(seconds=1))] = timedelta(minutes=1)
    """The pause before the first retry; it doubles before each further one, up to an hour."""

    @field_validator("sql")
    @classmethod
    def _not_empty(cls, sql: str | None) -> str | None:
        if sql is not None and not sql.strip():
            raise ValueError("an SQL statement")
        return sql
