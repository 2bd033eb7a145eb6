"""What the proofs of outages start, ended after each; the daemons' logs are part of what a failure says."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.integration.oauth.provider import Provider, running
from tests.proofs.outages import clock, network, postgresql
from tests.proofs.outages.clock import Clock
from tests.proofs.outages.daemons import Daemons
from tests.proofs.outages.links import Links
from tests.proofs.outages.network import Network
from tests.proofs.outages.postgresql import Cluster
from tests.support.servers import port

_LINES = 40


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    daemons = getattr(item, "funcargs", {}).get("daemons")
    if report.when == "call" and report.failed and daemons is not None:  # type: ignore[attr-defined]
        for daemon in daemons:
            end = "\n".join(daemon.digest()[-_LINES:])
            report.sections.append((f"the end of what {daemon.name} said", end))  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="session")
def debian() -> None:
    """Skip what needs root and Debian's packages where they are not to be had."""
    missing = [
        name
        for name, there in (
            ("root", os.geteuid() == 0),
            ("postgresql", postgresql.programs()),
            ("libfaketime", clock.library()),
            ("iproute2", shutil.which("ip")),
        )
        if not there
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; .ci/outages installs the packages")


@pytest.fixture
def folder(debian: None) -> Iterator[Path]:
    """A folder that PostgreSQL's own user may enter, which pytest's are not."""
    with TemporaryDirectory(prefix="outages-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def daemons(folder: Path) -> Iterator[Daemons]:
    daemons = Daemons(folder)
    yield daemons
    daemons.end()


@pytest.fixture
def cluster(folder: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters that are yet to be created; each is ended after the test."""
    clusters: list[Cluster] = []

    def make(**options: object) -> Cluster:
        its = folder / f"cluster-{len(clusters) + 1}"
        clusters.append(Cluster(its, **{"port": port(), **options}))  # type: ignore[arg-type]
        return clusters[-1]

    yield make
    for each in clusters:
        each.end()


@pytest.fixture
def primary(cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster with the daemons' database."""
    primary = cluster()
    primary.create()
    return primary


@pytest.fixture
def standby(cluster: Callable[..., Cluster], primary: Cluster) -> Cluster:
    """A standby of `primary`, asynchronous, that has caught up."""
    standby = cluster()
    standby.follow(primary)
    return standby


@pytest.fixture
def make_clock(folder: Path) -> Callable[[str], Clock]:
    return lambda name: Clock(folder / f"clock-of-{name}")


@pytest.fixture
def make_network() -> Iterator[Callable[[int], Network]]:
    if not network.works():
        pytest.skip("no network namespaces with iptables here")
    with ExitStack() as opened:
        yield lambda number: opened.enter_context(Network(number))


@pytest.fixture
def make_links() -> Iterator[Callable[[int], Links]]:
    """Makes links of a strict provider."""
    with ExitStack() as opened:
        yield lambda number: Links(opened.enter_context(running(Provider())), number)
