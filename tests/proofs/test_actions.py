"""Actions under daemons that are killed at random: none is lost, none is done twice once its outcome is stored."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import psycopg
import pytest
from psycopg.types.json import Jsonb

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables

ROOT = Path(__file__).parents[2]
HANDLERS = ROOT / "tests" / "integration" / "actions"

CONFIG = """
[database]
url = "{url}"

[scheduler]
shutdown_grace = 10

[logging]
format = "json"

[actions]
note.call = "handlers:note"
kill.call = "handlers:kill"
hang.call = "handlers:hang"
freeze.call = "handlers:freeze"

[jobs.check-actions]
interval = 1
lease = 4
action_timeout = 2
retry_after = 1
"""

POISON = ("kill", "hang", "freeze")


class Daemons:
    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "config.toml"
        self._config.write_text(CONFIG.format(url=url))
        self._config.chmod(0o600)
        self._started = 0
        self.living: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        command = [sys.executable, "-m", "catfeeder_cron", "--config", str(self._config), "start"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HANDLERS}"}
        with (self._folder / f"{self._started}.log").open("wb") as log:
            self.living.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        self._started += 1

    def kill_one(self) -> None:
        victim = self.living.pop(random.randrange(len(self.living)))
        victim.kill()
        victim.wait()

    def stop(self) -> None:
        for daemon in self.living:
            daemon.terminate()
        assert [daemon.wait(timeout=30) for daemon in self.living] == [0] * len(self.living)
        self.living.clear()


@pytest.fixture
def daemons(database_url: str, tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(database_url, tmp_path)
    yield daemons
    for daemon in daemons.living:
        daemon.kill()
        daemon.wait()


def prove(
    database_url: str, daemons: Daemons, notes: Path, number: int, actions: int, kills: int, every: float
) -> None:
    settings = DatabaseSettings.model_validate({"url": database_url})
    with Database(settings) as database:
        list(chain(schema.upgrade(database), create_tables(database, settings.tables)))
    with psycopg.connect(database_url, autocommit=True) as admin:
        insert = """INSERT INTO "Actions" (kind, user_id, payload, due_at, max_attempts)
                    SELECT %s, n %% 50, %s, now(), %s FROM generate_series(1, %s) n"""
        admin.execute(insert, ["note", Jsonb({"file": str(notes)}), 50, actions])
        for kind in POISON:
            admin.execute(insert, [kind, Jsonb({"file": str(notes)}), 2, 2])
        for _ in range(number):
            daemons.start()
        left = """SELECT count(*) FROM "Actions" WHERE state IN ('pending', 'running')"""
        until = time.monotonic() + 300
        kill_at = time.monotonic() + every
        while admin.execute(left).fetchone() != (0,):
            assert time.monotonic() < until, admin.execute(
                'SELECT kind, state, attempts, count(*) FROM "Actions" GROUP BY 1, 2, 3'
            ).fetchall()
            time.sleep(0.1)
            if kills and time.monotonic() >= kill_at:
                daemons.kill_one()
                daemons.start()
                kills -= 1
                kill_at = time.monotonic() + every * random.uniform(0.5, 1.5)
        assert kills == 0, "it was over before all the kills"
        daemons.stop()
        audit(admin, notes)


def audit(admin: psycopg.Connection, notes: Path) -> None:
    attempts = Counter(tuple(line.split()[:2]) for line in notes.read_text().splitlines())
    effects = Counter(id for id, _ in attempts.elements())
    assert max(attempts.values()) == 1, "no attempt was made twice"
    states = admin.execute('SELECT id::text, kind, state, attempts FROM "Actions"').fetchall()
    assert {(kind in POISON, state) for _, kind, state, _ in states} == {(False, "done"), (True, "failed")}
    assert {made for _, kind, _, made in states if kind in POISON} == {2}
    lost = """SELECT DISTINCT action_id::text FROM "ActionLog" WHERE outcome = 'lost'"""
    with_lost_attempts = {id for (id,) in admin.execute(lost)}
    for id, kind, _, _ in states:
        if kind == "note":
            assert effects[id] >= 1, "done at least once"
            assert effects[id] == 1 or id in with_lost_attempts, "once where every outcome was stored"
    kept = 'SELECT count(*) FROM "Actions" WHERE lease_owner IS NOT NULL OR lease_until IS NOT NULL'
    assert admin.execute(kept).fetchone() == (0,), "no lease is left"
    overlapping = """
        SELECT count(*) FROM "ActionLog" a JOIN "ActionLog" b ON a.action_id = b.action_id AND a.id < b.id
        WHERE a.started_at < b.finished_at AND b.started_at < a.finished_at"""
    assert admin.execute(overlapping).fetchone() == (0,), "never two attempts at once"
    unlogged = """
        SELECT count(*) FROM "Actions"
        WHERE attempts <> (SELECT count(*) FROM "ActionLog" WHERE action_id = "Actions".id)"""
    admin.execute('CREATE INDEX ON "ActionLog" (action_id)')
    assert admin.execute(unlogged).fetchone() == (0,), "every attempt has its line"


@pytest.mark.proof
def test_killed_daemons_lose_and_double_nothing(database_url: str, daemons: Daemons, tmp_path: Path) -> None:
    prove(database_url, daemons, tmp_path / "notes", number=2, actions=1500, kills=2, every=1.5)


@pytest.mark.proof
def test_four_daemons_and_20_000_actions(database_url: str, daemons: Daemons, tmp_path: Path) -> None:
    prove(database_url, daemons, tmp_path / "notes", number=4, actions=20_000, kills=12, every=1.5)
