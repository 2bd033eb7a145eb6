"""Start a new feeding period: set "Pet".food_eaten to 0 once food_reset has passed."""

from datetime import timedelta
from types import MappingProxyType
from typing import LiteralString

from psycopg import sql
from pydantic import Field

from catfeeder_cron.config import Duration, JobSettings
from catfeeder_cron.database import single
from catfeeder_cron.database.catalog import find_table
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.database.time_columns import TimeColumn
from catfeeder_cron.job import Job, JobContext


class ResetFoodCounters(JobSettings):
    """[jobs.reset-food-counters]."""

    web_server_keys = MappingProxyType({"reset_food_counters_interval": "interval"})
    enabled: bool = False
    interval: Duration | None = timedelta(seconds=3600)
    batch_size: int = Field(default=1000, ge=1)
    """The most rows that one transaction resets."""


# A period is a number of seconds, so daylight saving time does not change it. One cutoff holds for the whole run, so a
# row with a short period is not reset twice. In a column without a zone, the later reading of a time counts: by the
# earlier one, a row whose next reset is in the second pass of a repeated hour would be due again in the first.
_DUE = """{reset_at} <= %(cutoff)s::timestamptz AND food_reset > '-infinity' AND {period} > interval '0'"""
_PERIOD = "(coalesce(time_reset_hours, 0) * interval '1 hour' + coalesce(time_reset_minutes, 0) * interval '1 minute')"
_NEXT_RESET: LiteralString = """
    reset_at + period * (floor(extract(epoch FROM now() - reset_at) / extract(epoch FROM period)) + 1)"""

# MATERIALIZED: the rows are chosen and locked once, with every plan.
_RESET = """
    WITH due AS MATERIALIZED (
        SELECT id, {reset_at} AS reset_at, {period} AS period
        FROM {pet} WHERE {due} ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
    UPDATE {pet} AS pet SET food_eaten = 0, food_reset = {next_reset} FROM due WHERE pet.id = due.id"""

_COUNT = "SELECT count(*) FROM {pet} WHERE {due}"


def run(context: JobContext, settings: ResetFoodCounters) -> None:
    """Reset the due rows in batches. Locked rows wait for the next run; rows with a period of 0 are never due."""
    with context.transaction() as connection:
        _, column_type = find_table(connection, context.tables.schema_, context.tables.pet, "food_reset")
        times = TimeColumn.of(connection, column_type, context.database.naive_timestamps)
        (cutoff,) = single(connection, "SELECT now()::text")
        if context.dry_run:
            (context.counts["would_reset"],) = single(
                connection, _statement(_COUNT, context, times), {"cutoff": cutoff}
            )
            return
    statement = _statement(_RESET, context, times)
    context.counts["reset"] = 0
    reset = settings.batch_size
    while reset == settings.batch_size:
        with context.transaction() as connection:
            reset = connection.execute(statement, {"cutoff": cutoff, "limit": settings.batch_size}).rowcount
        context.counts["reset"] += reset


def _statement(text: LiteralString, context: JobContext, times: TimeColumn) -> sql.Composed:
    names: dict[str, sql.Composable] = {
        "pet": sql.Identifier(context.tables.schema_, context.tables.pet),
        "reset_at": times.latest("food_reset"),
        "period": sql.SQL(_PERIOD),
        "next_reset": times.stored(_NEXT_RESET),
    }
    return sql.SQL(text).format(due=sql.SQL(_DUE).format(**names), **names)


JOB = Job(
    id="reset-food-counters",
    summary="start a new feeding period for pets whose food_reset has passed",
    settings=ResetFoodCounters,
    run=run,
    tables=(
        TableUse(
            "pet",
            ("SELECT", "UPDATE"),
            ("id",),
            instants=("food_reset",),
            numbers=("food_eaten", "time_reset_hours", "time_reset_minutes"),
        ),
    ),
)
