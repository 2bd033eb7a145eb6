"""Links between daemons and database that are cut, one way too, that lose packets, or are slow."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Event, Thread

import psycopg
import pytest

from tests.proofs.outages import audits
from tests.proofs.outages.daemons import NO_RENEWAL, Daemons
from tests.proofs.outages.network import PORT, Network
from tests.proofs.outages.postgresql import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.outage
CUT_SECONDS = 75
SILENCE_IS_TOLD_WITHIN = 15
# Runs that last longer than a cut daemon has until others take its place, back to back.
JOBS = f"""{NO_RENEWAL}
[jobs.polite]
call = "recorded:polite"
kwargs = {{ job = "polite", seconds = 70 }}
interval = 5
timeout = 120

[jobs.deaf]
call = "recorded:deaf"
kwargs = {{ job = "deaf", seconds = 70 }}
interval = 5
timeout = 120

[jobs.statement]
sql = "SELECT pg_sleep(70) AS statement_of_a_job"
interval = 5
timeout = 120
"""
NETWORKS = """
host all cats 10.213.0.0/16 scram-sha-256
"""
_STATEMENTS = """
    SELECT array_agg(pid) FROM pg_stat_activity
    WHERE state = 'active' AND query LIKE 'SELECT pg_sleep(70) AS statement_of_a_job%'"""
_OWNERS = (
    "SELECT job, pid FROM catfeeder_cron.job_runs JOIN catfeeder_cron.daemons USING (daemon, pid) WHERE outcome IS NULL"
)


@dataclass
class Scene:
    """Daemons in namespaces of their own, numbered from 1, and their database in another."""

    network: Network
    cluster: Cluster
    daemons: Daemons
    doubled: list[list[int]] = field(default_factory=list)

    def number_of_owner(self, job: str) -> int:
        """Return which daemon runs this job now, as soon as one does."""

        def owner() -> int:
            with self.cluster.admin() as connection:
                pids = [pid for its, pid in connection.execute(_OWNERS).fetchall() if its == job]
            return next((n for n, daemon in enumerate(self.daemons, 1) if daemon.pid in pids), 0)

        return int(eventually(owner, f"a run of {job}"))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look, from the server, for two statements of one SQL job at work at once."""
        over = Event()

        def watch() -> None:
            with self.cluster.admin() as connection:
                while not over.wait(0.2):
                    row = connection.execute(_STATEMENTS).fetchone()
                    if row and len(row[0] or []) > 1:
                        self.doubled.append(row[0])

        watcher = Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def audit(self, *further: audits.Check) -> None:
        """Nothing ran twice at once, every slot has a row, and all that was left open is closed."""
        audits.require_all(
            *further,
            lambda: audits.require_all_at_work(self.daemons, self.cluster),
            lambda: audits.require_never_twice_at_once(self.daemons),
            self.require_no_statement_doubled,
            lambda: audits.require_orderly_end(self.daemons, self.cluster, "tick", "polite", "deaf", "statement"),
        )

    def require_no_statement_doubled(self) -> None:
        assert not self.doubled, f"two statements of one SQL job at once, {len(self.doubled) * 0.2:.0f} s long"


MakeScene = Callable[..., Scene]


@pytest.fixture
def scene(make_network: Callable[[int], Network], cluster: Callable[..., Cluster], daemons: Daemons) -> MakeScene:
    def make(number: int, *, slow: bool = False) -> Scene:
        network = make_network(number)
        database = cluster(address="*", port=PORT, prefix=network.at_database, hba=NETWORKS)
        database.create()
        for each in range(1, number + 1):
            url = database.url(address=network.address(each))
            if slow and each == number:  # its link can be slow
                host, port = network.add_proxy(each)
                url = psycopg.conninfo.make_conninfo(url, host=host, port=port)
            daemons.add(url, JOBS, prefix=network.at(each))
        daemons.prepare()
        daemons.start()
        audits.require_all_at_work(daemons, database)
        return Scene(network, database, daemons)

    return make


def require_told_in_time(scene: Scene, number: int, begun: datetime) -> None:
    """A daemon whose database went silent says so within a quarter of a minute, and once."""
    daemon = scene.daemons[number - 1]
    said = daemon.said_after("database_unreachable", begun)
    assert said, f"{daemon.name} has not told of its outage"
    late = (datetime.fromisoformat(said[0]["timestamp"]) - begun).total_seconds()
    assert late <= SILENCE_IS_TOLD_WITHIN, f"{daemon.name} told of its outage {late:.0f} s late"
    assert len(said) == 1, f"{daemon.name} told of one outage {len(said)} times"


CUTS = [
    pytest.param(2, {}, "polite", id="both-ways"),
    pytest.param(2, {"asking": False}, "deaf", id="answers"),
    pytest.param(4, {}, "deaf", id="both-ways-long", marks=pytest.mark.proof),
    pytest.param(4, {"asking": False}, "polite", id="answers-long", marks=pytest.mark.proof),
    pytest.param(4, {"answers": False}, "deaf", id="requests-long", marks=pytest.mark.proof),
    pytest.param(4, {}, "statement", id="statement-both-ways-long", marks=pytest.mark.proof),
    pytest.param(4, {"asking": False}, "statement", id="statement-answers-long", marks=pytest.mark.proof),
]


@pytest.mark.parametrize(("number", "directions", "job"), CUTS)
def test_a_daemon_that_is_cut_off_ends_its_run_before_another_begins(
    scene: MakeScene, number: int, directions: dict[str, bool], job: str
) -> None:
    at = scene(number)
    with at.watched():
        owner = at.number_of_owner(job)
        begun = datetime.now(UTC)
        at.network.cut(owner, **directions)
        time.sleep(CUT_SECONDS)  # an outage has to last for a while
        at.network.heal()
        time.sleep(5)  # an overlap has to last for a while, too
    at.audit(lambda: require_told_in_time(at, owner, begun), lambda: audits.require_calm(at.daemons, 8))


@pytest.mark.proof
def test_ten_minutes_of_faults_at_random(scene: MakeScene) -> None:
    chance = random.Random(20261127)
    at = scene(4, slow=True)
    network = at.network
    faults: dict[str, Callable[[int], None]] = {
        "cut both ways": network.cut,
        "requests lost": lambda number: network.cut(number, answers=False),
        "answers lost": lambda number: network.cut(number, asking=False),
        "30 % lost": lambda number: network.lose(number, 0.3),
        "unplugged": network.unplug,
        "slow": lambda _: network.delay(4, 0.5),
    }
    end = time.monotonic() + 600
    with at.watched():
        while time.monotonic() < end:
            fault = chance.choice(list(faults))
            faults[fault](chance.randint(1, 4))
            time.sleep(90)
            network.heal()
            time.sleep(chance.uniform(5, 20))
    at.audit()


def test_a_slow_link_and_one_that_loses_packets_are_no_outage(scene: MakeScene) -> None:
    at = scene(2, slow=True)
    with at.watched():
        at.network.delay(2, 0.5)
        at.network.lose(1, 0.3)
        time.sleep(45)
        at.network.heal()
    at.audit(lambda: audits.require_no_run_closed_as_dead(at.daemons))
