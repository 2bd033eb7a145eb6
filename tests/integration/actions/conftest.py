"""What the tests of actions have in common: the tables, actions in them, and runs of check-actions."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from catfeeder_cron.config import ActionsSettings, DatabaseTables
from catfeeder_cron.database import Database
from catfeeder_cron.job import JobContext, Resources
from catfeeder_cron.jobs import check_actions
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.executor import run_job

HERE = Path(__file__).parent
KINDS = (
    *("note", "note_later", "noop", "fail", "hopeless", "postponed", "wait_for", "kill", "leave", "resign", "freeze"),
    *("hang", "scribble", "generate", "garble", "until_stopped", "beat", "beat_until_stopped"),
)


class Actions:
    """The table "Actions", from the web server's side."""

    def __init__(self, admin: psycopg.Connection, file: Path) -> None:
        self.admin = admin
        self.file = file

    def add(self, kind: str, payload: Any = None, due: str = "0 s", **columns: Any) -> int:
        """Insert an action that was due that long ago; `payload` names the file of `notes` besides."""
        columns |= {"kind": kind, "payload": Jsonb({"file": str(self.file), **(payload or {})})}
        names = ", ".join(columns)
        places = ", ".join(f"%({name})s" for name in columns)
        statement = f'INSERT INTO "Actions" (due_at, {names}) VALUES (now() - %(due)s::interval, {places}) RETURNING id'
        row = self.admin.execute(statement, columns | {"due": due}).fetchone()
        assert row is not None
        return int(row[0])

    def get(self, id: int, columns: str) -> Any:
        row = self.admin.execute(f'SELECT {columns} FROM "Actions" WHERE id = %s', [id]).fetchone()
        assert row is not None
        return row[0] if len(row) == 1 else row

    def log(self, id: int) -> list[tuple[Any, ...]]:
        """(attempt, outcome, detail) of every attempt."""
        statement = 'SELECT attempt, outcome, detail FROM "ActionLog" WHERE action_id = %s ORDER BY id'
        return self.admin.execute(statement, [id]).fetchall()

    def notes(self) -> list[list[str]]:
        """[id, attempt, key] of every note."""
        return [line.split() for line in self.file.read_text().splitlines()] if self.file.exists() else []


@pytest.fixture
def actions(admin: psycopg.Connection, with_tables: None, tmp_path: Path) -> Actions:
    return Actions(admin, tmp_path / "notes")


@pytest.fixture
def context(database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobContext]:
    """Makes contexts of runs that know the handlers of this folder."""
    monkeypatch.syspath_prepend(str(HERE))

    def make(timeout: float = 300, allowed: tuple[str, ...] = (), **more: Any) -> JobContext:
        calls = {kind: {"call": f"handlers:{kind}"} for kind in KINDS}
        return JobContext(
            database=more.pop("database", database),
            tables=DatabaseTables(),
            timeout=timedelta(seconds=timeout),
            resources=Resources(actions=ActionsSettings.model_validate({"webhook": {"allowed": allowed}, **calls})),
            **more,
        )

    return make


Run = Callable[..., JobReport]


@pytest.fixture
def run(context: Callable[..., JobContext]) -> Run:
    """Runs check-actions now. Keywords are options of the job, `given` a context."""

    def run(given: JobContext | None = None, **options: Any) -> JobReport:
        settings = check_actions.CheckActions.model_validate(options)
        return run_job(check_actions.JOB, given or context(), settings)

    return run
