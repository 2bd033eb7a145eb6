"""A restore under running daemons: what they have done is not done again."""

from pathlib import Path

from tests.integration.actions.conftest import HERE, Actions
from tests.support.program import Program
from tests.support.waiting import eventually

CONFIG = """
[actions.note]
call = "handlers:note"

[jobs.check-actions]
interval = 1
"""

# What a restore of a dump brings back: the tables as they were, each as a new table.
SAVE = """
    CREATE SCHEMA saved;
    CREATE TABLE saved.actions AS TABLE "Actions";
    CREATE TABLE saved.log AS TABLE "ActionLog";
    CREATE TABLE saved.lineage (LIKE catfeeder_cron.lineage INCLUDING ALL);
    INSERT INTO saved.lineage TABLE catfeeder_cron.lineage"""
RESTORE = """
    BEGIN;
    DROP TABLE catfeeder_cron.lineage;
    CREATE TABLE catfeeder_cron.lineage (LIKE saved.lineage INCLUDING ALL);
    TRUNCATE "Actions", "ActionLog";
    INSERT INTO "Actions" TABLE saved.actions;
    INSERT INTO "ActionLog" TABLE saved.log;
    INSERT INTO catfeeder_cron.lineage TABLE saved.lineage;
    COMMIT"""


def test_daemons_store_again_what_a_restore_has_lost(
    actions: Actions, program: Program, database_url: str, tmp_path: Path
) -> None:
    program.configure(database_url, CONFIG)
    daemons = [program.start("start", variables={"PYTHONPATH": str(HERE)}) for _ in range(2)]
    for daemon in daemons:
        daemon.wait_for("daemon_started")
    with actions.admin.transaction():
        ids = [actions.add("note", due="-5 s") for _ in range(20)]
    actions.admin.execute(SAVE)
    eventually(lambda: {actions.get(id, "state") for id in ids} == {"done"})

    actions.admin.execute(RESTORE)
    eventually(lambda: {actions.get(id, "state") for id in ids} == {"done"}, seconds=100)

    assert len(actions.notes()) == len(ids), "each was done once"
    assert all(actions.log(id)[0][1] == "done" and "stored it again" in actions.log(id)[0][2] for id in ids)
    for daemon in daemons:
        assert "history_went_back" in daemon.stderr
    assert any("action_was_done_before" in daemon.stderr for daemon in daemons)
    for daemon in daemons:
        daemon.stop()
