"""Computes when a job is due: its slots are equal in every process on every machine."""

from catfeeder_cron.schedule.schedules import (
    EPOCH,
    MICROSECOND,
    CronSchedule,
    DateSchedule,
    IntervalSchedule,
    Schedule,
    Slots,
    longest_gap,
    stable_hash,
)

__all__ = [
    "EPOCH",
    "MICROSECOND",
    "CronSchedule",
    "DateSchedule",
    "IntervalSchedule",
    "Schedule",
    "Slots",
    "longest_gap",
    "stable_hash",
]
