"""Start a new feeding period: set "Pet".food_eaten to 0 once food_reset has passed."""

from datetime import timedelta

from psycopg import sql
from pydantic import Field

from catfeeder_cron.catalog import find_table
from catfeeder_cron.config import Duration, JobSettings
from catfeeder_cron.database import single
from catfeeder_cron.job import Job, JobContext, TableUse


class ResetFoodCounters(JobSettings):
    enabled: bool = False
    interval: Duration | None = timedelta(seconds=3600)
    batch_size: int = Field(default=1000, ge=1)
    """Rows that one transaction resets at most."""


# A period is a number of seconds, so food_reset moves on by as many whole ones as lead past
# now().
_RESET = """
    UPDATE {pet} AS pet
    SET food_eaten = 0, food_reset = pet.food_reset + due.period * (
            floor(extract(epoch FROM now() - pet.food_reset) / extract(epoch FROM due.period)) + 1)
    FROM (
        SELECT id, make_interval(hours => time_reset_hours, mins => time_reset_minutes) AS period FROM {pet}
        WHERE food_reset <= now() AND food_reset > '-infinity' AND time_reset_hours * 60 + time_reset_minutes > 0
        ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED) AS due
    WHERE pet.id = due.id"""

_COUNT = """
    SELECT count(*) FROM {pet}
    WHERE food_reset <= now() AND food_reset > '-infinity' AND time_reset_hours * 60 + time_reset_minutes > 0"""


def run(context: JobContext, settings: ResetFoodCounters) -> None:
    """Reset the due rows in batches. Rows that somebody has locked wait for the next run; a period of 0 is none."""
    pet = sql.Identifier(context.tables.schema_, context.tables.pet)
    with context.transaction() as connection:
        find_table(connection, context.tables.schema_, context.tables.pet, "food_reset")
        if context.dry_run:
            (context.counts["would_reset"],) = single(connection, sql.SQL(_COUNT).format(pet=pet))
            return
    context.counts["reset"] = 0
    reset = settings.batch_size
    while reset == settings.batch_size:
        with context.transaction() as connection:
            statement = sql.SQL(_RESET).format(pet=pet)
            reset = connection.execute(statement, {"limit": settings.batch_size}).rowcount
        context.counts["reset"] += reset


JOB = Job(
    id="reset-food-counters",
    summary="start a new feeding period for pets whose food_reset has passed",
    settings=ResetFoodCounters,
    run=run,
    tables=(
        TableUse(
            "pet",
            ("SELECT", "UPDATE"),
            ("id", "food_eaten", "time_reset_hours", "time_reset_minutes"),
            times=("food_reset",),
        ),
    ),
)
