"""A primary that is lost, an asynchronous standby that takes its place, and the old primary that comes back."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from tests.proofs.outages import audits
from tests.proofs.outages.daemons import NO_RENEWAL, Daemon, Daemons
from tests.proofs.outages.links import RENEWAL, Links
from tests.proofs.outages.postgresql import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.outage
MakeLinks = Callable[[int], Links]
SIZES = [pytest.param(2, 20, id="short"), pytest.param(4, 200, id="long", marks=pytest.mark.proof)]
RECORDED = """
[jobs.polite]
call = "recorded:polite"
kwargs = { job = "polite", seconds = 20 }
interval = 5
"""


def set_up(daemons: Daemons, number: int, primary: Cluster, standby: Cluster, jobs: str) -> None:
    """Start daemons that know both servers, the primary first."""
    for _ in range(number):
        daemons.add(primary.url(standby), jobs + RECORDED)
    daemons.prepare()


def fail_over(daemons: Daemons, primary: Cluster, standby: Cluster) -> None:
    """Lose the primary with what the standby has not got, promote that, and wait for the daemons to be there."""
    primary.kill()
    standby.promote()
    audits.require_all_at_work(daemons, standby)


@pytest.mark.parametrize(("number", "links"), SIZES)
def test_a_standby_that_lacks_the_last_seconds_costs_no_token_and_no_slot(
    daemons: Daemons, primary: Cluster, standby: Cluster, make_links: MakeLinks, number: int, links: int
) -> None:
    set_up(daemons, number, primary, standby, RENEWAL)
    oauth = make_links(links)
    oauth.insert(primary)
    daemons.start()
    audits.require_all_at_work(daemons, primary)
    standby.catch_up(primary)
    standby.cut_replication()
    oauth.renew_all(primary)
    oauth.require_stored(primary)
    before = audits.Memory(primary)

    audits.require_all(
        lambda: fail_over(daemons, primary, standby),
        lambda: oauth.require_stored(standby),
        lambda: oauth.renew_all(standby),
        lambda: oauth.require_stored(standby),
        lambda: before.require_agreement(standby),
        lambda: audits.require_never_twice_at_once(daemons),
        lambda: audits.require_calm(daemons, 5),
        lambda: audits.require_said_once(daemons, "database_unreachable", least=0),
        lambda: audits.require_said_once(daemons, "history_went_back"),
        lambda: audits.require_orderly_end(daemons, standby, "tick", "polite", kept=False),
    )


@pytest.mark.parametrize(("number", "links"), SIZES)
def test_a_stale_primary_that_takes_writes_again_gets_no_renewals(
    daemons: Daemons, primary: Cluster, standby: Cluster, make_links: MakeLinks, number: int, links: int
) -> None:
    set_up(daemons, number, primary, standby, RENEWAL)
    oauth = make_links(links)
    oauth.insert(primary)
    daemons.start()
    standby.catch_up(primary)
    fail_over(daemons, primary, standby)
    oauth.renew_all(standby)
    oauth.require_stored(standby)

    primary.start()
    restarted, others = daemons[0], daemons[1:]
    restarted.stop()
    restarted.start()
    with primary.admin() as connection:
        connection.execute('UPDATE "ActiveOauths" SET token_expiration = now()')

    audits.require_all(
        lambda: require_said_loudly(restarted),
        lambda: require_harm_is_left_undone(restarted, primary, oauth),
        # With what can do no harm, as soon as runs that its ledger has of daemons that are gone are taken for dead.
        lambda: audits.require_all_at_work([restarted], primary, 60),
        lambda: audits.require_all_at_work(others, standby),
        lambda: oauth.require_stored(standby),
        lambda: oauth.renew_all(standby),
        lambda: audits.require_calm(daemons, 5),
        daemons.stop,
    )


def require_said_loudly(daemon: Daemon) -> None:
    """It says once that its server is stale, and goes on to tell it as a trouble."""
    name = "database_is_an_old_copy"
    eventually(lambda: daemon.events(name), f"{daemon.name} says that its server is an old copy", 30)
    (said,) = daemon.events(name)
    assert said["level"] == "error", said
    assert said["reason"] in daemon.ready(), daemon.ready()


def require_harm_is_left_undone(daemon: Daemon, stale: Cluster, oauth: Links) -> None:
    """Slots of the renewal go by on the stale server, each accounted for, and no token is sent."""
    begun = datetime.now(UTC)
    sent = len(oauth.provider.requests)
    query = """SELECT coalesce(sum(coalesce(missed, 1)), 0) FROM catfeeder_cron.job_runs
               WHERE job = 'renew-oauth' AND outcome = 'skipped' AND coalesce(last_slot, slot) > %s"""

    def passed_over() -> bool:
        with stale.admin() as connection:
            row = connection.execute(query, [begun]).fetchone()
        return row is not None and row[0] >= 3

    eventually(passed_over, f"slots of renew-oauth that {daemon.name} passed over, with their reason", 40)
    assert len(oauth.provider.requests) == sent, "tokens were sent that a stale server had"
    oauth.require_none_lost()


@pytest.mark.parametrize("number", [pytest.param(2, id="short"), pytest.param(4, id="long", marks=pytest.mark.proof)])
def test_a_switch_over_with_the_sessions_left_open_is_followed(
    daemons: Daemons, primary: Cluster, standby: Cluster, number: int
) -> None:
    set_up(daemons, number, primary, standby, NO_RENEWAL)
    daemons.start()
    audits.require_all_at_work(daemons, primary)
    primary.set("default_transaction_read_only", "on")
    eventually(lambda: is_read_only(primary), "the primary refuses writes")
    standby.catch_up(primary)
    standby.promote()

    audits.require_all(
        lambda: audits.require_all_at_work(daemons, standby),
        lambda: audits.require_said_once(daemons, "database_unreachable", least=0),
        lambda: audits.require_calm(daemons, 5),
        lambda: audits.require_orderly_end(daemons, standby),
        lambda: require_true_reasons(standby),
    )


def require_true_reasons(cluster: Cluster) -> None:
    """A slot that passed without a run has no other reasons than the outage and the move."""
    query = "SELECT DISTINCT reason FROM catfeeder_cron.job_runs WHERE missed IS NOT NULL AND job = 'tick'"
    with cluster.admin() as connection:
        reasons = {reason for (reason,) in connection.execute(query).fetchall()}
    untrue = reasons - {"database unreachable", "the database had just moved", "still running"}
    assert not untrue, f"reasons of missed slots: {untrue}"


def is_read_only(cluster: Cluster) -> bool:
    with cluster.admin() as connection:
        return connection.execute("SHOW transaction_read_only").fetchone() == ("on",)
