"""On a former primary that came back, jobs whose effects can't be undone do nothing; the others go on."""

from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from catfeeder_cron.config import JobSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.jobs import check_actions, clean_tokens, renew_oauth
from catfeeder_cron.scheduler.executor import run_job
from tests.integration.daemons import Work, context

LINEAGE = Lineage(uuid4(), datetime.now(UTC), None, "7/00000001/16384", 9)
OLD = "the server is on timeline 1, and this host has worked with its timeline 2"


@pytest.mark.parametrize(("irreversible", "outcome"), [(True, "skipped"), (False, "succeeded")])
def test_a_job_runs_on_an_old_copy_only_if_its_effects_stay_there(
    database: Database, irreversible: bool, outcome: str
) -> None:
    schema.ensure(database)
    work = Work()
    job = replace(work.job, irreversible=irreversible)
    database.lineage = replace(LINEAGE, stale=OLD)
    report = run_job(job, context(database), JobSettings())
    assert report.outcome == outcome
    assert report.reason == (OLD if irreversible else None)
    assert work.runs == (outcome == "succeeded")

    database.lineage = LINEAGE
    assert run_job(job, context(database), JobSettings()).outcome == "succeeded"


def test_the_jobs_that_send_something_are_those() -> None:
    assert renew_oauth.JOB.irreversible
    assert check_actions.JOB.irreversible
    assert not clean_tokens.JOB.irreversible
