"""Going on with another configuration, in one process: what is put on the schedule, and what is left alone."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from catfeeder_cron import Crons
from catfeeder_cron.config import Settings
from catfeeder_cron.errors import DatabaseError
from catfeeder_cron.jobs import load_settings
from catfeeder_cron.oauth.client import OAuthClient
from tests.integration.daemons import heart, rows, tasks_of, wait_for

Configure = Callable[[str], Settings]

CAN_BE_OFF = ("clean-tokens", "clean-verification", "renew-oauth")
ALWAYS_ON = "check-actions"


@pytest.fixture
def configure(with_schema_heard_of_for_long: None, database_url: str, tmp_path: Path) -> Configure:
    def read(jobs: str) -> Settings:
        path = tmp_path / "config.toml"
        built_ins_off = "".join(f"[jobs.{job}]\nenabled = false\n" for job in CAN_BE_OFF if job not in jobs)
        path.write_text(f'[database]\nurl = "{database_url}"\n{built_ins_off}{jobs}\n')
        return load_settings(path, environ={})

    return read


@pytest.fixture
def start(configure: Configure, admin: psycopg.Connection) -> Iterator[Callable[[str], Crons]]:
    opened: list[Crons] = []

    def begin(jobs: str) -> Crons:
        opened.append(Crons(config=configure(jobs)))
        assert opened[-1].inject_crons() == 0
        heart(opened[-1])
        return opened[-1]

    yield begin
    for crons in opened:
        crons.close()


def accounts(admin: psycopg.Connection) -> dict[str, str]:
    found = admin.execute("SELECT job, trigger FROM catfeeder_cron.schedule WHERE job <> %s", [ALWAYS_ON])
    return dict(found.fetchall())


def scheduled(crons: Crons) -> dict[str, Any]:
    """The tasks by their ids, without those of the job that is always there, and without the looking after files."""
    others = [task for task in tasks_of(crons).tasks if not task.id.startswith(ALWAYS_ON)]
    return {task.id: task for task in others if not task.id.endswith("(tending)")}


JOB = "[jobs.{name}]\nsql = 'SELECT 1'\n{rest}\n"
HOURLY = JOB.format(name="one", rest="interval = 3600")


def test_jobs_come_go_and_move(start: Callable[[str], Crons], configure: Configure, admin: psycopg.Connection) -> None:
    crons = start(HOURLY + JOB.format(name="two", rest="interval = 3600"))
    assert scheduled(crons).keys() == {"one", "two"}

    crons.reload(configure(JOB.format(name="one", rest="cron = '0 3 * * *'") + "[jobs.clean-tokens]\ninterval = 60"))

    assert scheduled(crons).keys() == {"one", "clean-tokens"}
    assert accounts(admin) == {"one": "cron 0 3 * * * (UTC)", "clean-tokens": "every 1m"}
    crons.reload(configure(JOB.format(name="one", rest="cron = '0 3 * * *'\nenabled = false")))
    assert scheduled(crons) == {}
    assert accounts(admin) == {}


def test_a_job_whose_trigger_stays_keeps_its_task_and_takes_its_new_options(
    start: Callable[[str], Crons], configure: Configure
) -> None:
    crons = start(HOURLY)
    before = scheduled(crons)["one"]

    crons.reload(configure(HOURLY.replace("SELECT 1", "SELECT 1 UNION SELECT 2") + "timeout = 7"))

    assert scheduled(crons)["one"] is before
    assert crons.settings.jobs["one"].timeout == timedelta(seconds=7)
    assert crons.run("one").counts == {"rows": 2}


def test_a_zone_of_the_scheduler_moves_the_jobs_that_name_none(
    start: Callable[[str], Crons], configure: Configure, admin: psycopg.Connection
) -> None:
    daily = JOB.format(name="one", rest="cron = '0 3 * * *'")
    crons = start(daily)

    crons.reload(configure(f"[scheduler]\ntimezone = 'Asia/Tokyo'\n{daily}"))

    assert accounts(admin) == {"one": "cron 0 3 * * * (Asia/Tokyo)"}
    assert scheduled(crons)["one"].next_run_time.utctimetuple().tm_hour == 18


def test_a_job_that_was_gone_for_a_while_does_not_catch_up_on_that_time(
    start: Callable[[str], Crons], configure: Configure, admin: psycopg.Connection
) -> None:
    crons = start(HOURLY)
    admin.execute("UPDATE catfeeder_cron.schedule SET accounted_until = now() - interval '5 h'")
    crons.reload(configure(""))
    crons.reload(configure(HOURLY))
    heart(crons)

    assert rows(admin, "reason", "job = 'one'") == []


def test_one_that_others_ran_meanwhile_goes_on_where_they_are(
    start: Callable[[str], Crons], configure: Configure, admin: psycopg.Connection
) -> None:
    crons = start("")
    admin.execute("INSERT INTO catfeeder_cron.schedule VALUES ('one', 'every 1h', now() - interval '5 h')")

    crons.reload(configure(HOURLY))

    wait_for(lambda: rows(admin, "1", "trigger = 'catch_up' AND outcome = 'succeeded'"))


def test_running_jobs_are_left_alone_even_when_they_are_removed(
    start: Callable[[str], Crons], configure: Configure, admin: psycopg.Connection
) -> None:
    crons = start("[jobs.long]\nsql = 'SELECT pg_sleep(1.5)'\ninterval = 1")
    wait_for(lambda: crons.running == ["long"])

    crons.reload(configure(HOURLY))

    assert crons.running == ["long"]
    wait_for(lambda: rows(admin, "1", "job = 'long' AND outcome = 'succeeded'"))
    assert scheduled(crons).keys() == {"one"}


def test_accounts_that_could_not_be_opened_are_opened_by_the_next_heartbeat(
    start: Callable[[str], Crons], configure: Configure, admin: psycopg.Connection
) -> None:
    crons = start("")
    admin.execute("ALTER TABLE catfeeder_cron.schedule RENAME TO away")
    with pytest.raises(DatabaseError, match="schedule"):
        crons.reload(configure(HOURLY))
    admin.execute("ALTER TABLE catfeeder_cron.away RENAME TO schedule")

    heart(crons)

    assert accounts(admin) == {"one": "every 1h"}


def test_what_looks_wrong_in_the_web_servers_section_is_logged_at_start_and_reload(
    start: Callable[[str], Crons], configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    crons = start("[Crons]\nprune_photos = true")
    crons.reload(configure("[Crons]\nprune_cats = true"))
    crons.reload(configure(""))
    told = [record.getMessage() for record in caplog.records if "configuration_warning" in record.getMessage()]
    assert ["Crons.prune_photos: unknown key" in told[0], "Crons.prune_cats: unknown key" in told[1]] == [True, True]
    assert len(told) == 2


def test_runs_share_an_oauth_client_until_its_settings_change(
    start: Callable[[str], Crons], configure: Configure
) -> None:
    def client(crons: Crons) -> OAuthClient:
        return crons._open().executor.context("renew-oauth").resources.oauth

    crons = start("")
    first = client(crons)
    crons.reload(configure(HOURLY))
    assert client(crons) is first

    changed = configure("[oauth]\nrequest_timeout = 7")
    crons.reload(changed)

    assert client(crons) is client(crons)
    assert client(crons).settings.request_timeout == timedelta(seconds=7)
    with Crons(config=configure(""), oauth=first) as others:
        others.reload(changed)
        assert client(others) is first, "it was handed in"
