"""A backup that is restored under running daemons, or while none runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proofs.outages import audits
from tests.proofs.outages.daemons import Daemons
from tests.proofs.outages.links import RENEWAL, Links
from tests.proofs.outages.postgresql import DATABASE, Cluster
from tests.proofs.outages.test_failover import RECORDED

pytestmark = pytest.mark.outage
SELDOM = '[jobs.seldom]\nsql = "SELECT 1"\ninterval = 20\n'


def dump(cluster: Cluster) -> Path:
    file = cluster.folder / "dump"
    cluster.run("pg_dump", "-Fc", "-f", str(file), DATABASE)
    return file


def recreate(cluster: Cluster, file: Path) -> None:
    with cluster.admin("postgres") as connection:
        connection.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)".encode())
    cluster.create_database()
    cluster.run("pg_restore", "-d", DATABASE, "-1", str(file))


def clean(cluster: Cluster, file: Path) -> None:
    cluster.run("pg_restore", "-d", DATABASE, "--clean", "--if-exists", "-1", str(file))


def cases() -> list[object]:
    return [
        pytest.param(restore, running, number, links, id=name, marks=marks)
        for restore, running, number, links, name, marks in (
            (recreate, True, 2, 20, "recreated-short", ()),
            (clean, True, 2, 20, "cleaned-short", ()),
            (recreate, False, 2, 20, "stopped-short", ()),
            (recreate, True, 4, 200, "recreated-long", pytest.mark.proof),
            (clean, True, 4, 200, "cleaned-long", pytest.mark.proof),
            (recreate, False, 4, 200, "stopped-long", pytest.mark.proof),
            (clean, False, 4, 200, "stopped-and-cleaned-long", pytest.mark.proof),
        )
    ]


@pytest.mark.parametrize(("restore", "running", "number", "links"), cases())
def test_a_restored_backup_costs_no_token_and_no_slot(
    daemons: Daemons,
    primary: Cluster,
    make_links: Callable[[int], Links],
    restore: Callable[[Cluster, Path], None],
    running: bool,
    number: int,
    links: int,
) -> None:
    for _ in range(number):
        daemons.add(primary.url(), RENEWAL + SELDOM + RECORDED)
    daemons.prepare()
    oauth = make_links(links)
    oauth.insert(primary)
    daemons.start()
    audits.require_all_at_work(daemons, primary)
    file = dump(primary)
    oauth.renew_all(primary)
    oauth.require_stored(primary)
    oauth.renew_all(primary)  # two renewals back
    oauth.require_stored(primary)
    audits.require_all_at_work(daemons, primary)  # what is lost is more than the time between two heartbeats
    if not running:
        daemons.stop()
    before = audits.Memory(primary)

    restore(primary, file)

    daemons.start()
    audits.require_all(
        lambda: audits.require_all_at_work(daemons, primary),
        lambda: oauth.require_stored(primary),
        lambda: oauth.renew_all(primary),
        lambda: oauth.require_stored(primary),
        lambda: audits.require_calm(daemons, 5),
        lambda: audits.require_said_once(daemons, "history_went_back"),
        *([lambda: before.require_agreement(primary)] if running else []),
        lambda: audits.require_never_twice_at_once(daemons),
        lambda: audits.require_orderly_end(daemons, primary, "tick", "polite", "seldom", kept=False),
    )
