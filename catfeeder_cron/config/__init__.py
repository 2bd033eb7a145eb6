"""Read config.toml and the environment into settings that are valid and don't change."""

from catfeeder_cron.config.durations import Duration, within
from catfeeder_cron.config.job_settings import CustomJobSettings, JobSettings
from catfeeder_cron.config.loading import load
from catfeeder_cron.config.settings import (
    ActionsSettings,
    DatabaseSettings,
    DatabaseTables,
    LoggingSettings,
    MetricsSettings,
    OAuthSettings,
    ProviderSettings,
    SchedulerSettings,
    Settings,
    WebhookSettings,
)
from catfeeder_cron.config.sources import holds_secret
from catfeeder_cron.config.state import state_directory

__all__ = [
    "ActionsSettings",
    "CustomJobSettings",
    "DatabaseSettings",
    "DatabaseTables",
    "Duration",
    "JobSettings",
    "LoggingSettings",
    "MetricsSettings",
    "OAuthSettings",
    "ProviderSettings",
    "SchedulerSettings",
    "Settings",
    "WebhookSettings",
    "holds_secret",
    "load",
    "state_directory",
    "within",
]
