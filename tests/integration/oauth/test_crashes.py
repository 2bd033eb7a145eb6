"""Processes that are killed, frozen or cut off from the database: no answer that was received is lost, none is doubled.

The provider is strict, and its records decide: a refresh token that is sent twice revokes its link.
"""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from catfeeder_cron.jobs import renew_oauth
from tests.integration.oauth.conftest import World
from tests.integration.oauth.disasters import blocked, cutting_off, processes, stored, wait_until
from tests.integration.oauth.provider import Provider, Raw, Request
from tests.support.loaded import Copy
from tests.support.waiting import SOON, eventually

Serve = Callable[..., Provider]

# An answer that was written to a socket so shortly before its reader was killed may not have been read.
UNREAD_SECONDS = 2


def test_an_answer_in_a_killed_processs_journal_is_stored_and_its_row_not_asked_for_again(
    world: World, provider: Provider
) -> None:
    """The database is away when the answers come in; the process is killed before it is back."""
    ids = [world.add_link(provider.log_in(f"user{number}")) for number in range(5)]

    with processes(world) as start, blocked(world) as block:
        provider.script, provider.delay = cutting_off(block, provider), 0.3
        process = start()
        wait_until(lambda: sum(provider.renewals.values()) == 5)
        wait_until(lambda: world.written_down() == 5)
        process.kill()
        process.wait()

    assert all(world.link(id).token == "old-access" for id in ids)
    assert world.leases() == 5
    report = world.renew()
    assert report.counts["due"] == 0
    assert stored(world, provider) == {f"user{number}" for number in range(5)}
    assert max(provider.renewals.values()) == 1
    assert provider.reused == []
    assert world.journals() == []
    assert world.leases() == 0


def test_a_killed_processs_leases_are_freed_at_once_where_it_died_and_later_elsewhere(
    world: World, provider: Provider, tmp_path: Path
) -> None:
    world.add_link(provider.log_in("tom"))
    provider.script = lambda _: Raw(hang=True)
    with processes(world) as start:
        process = start()
        wait_until(lambda: provider.requests)
        process.kill()
        process.wait()
    provider.script = None
    here, world.state_directory = world.state_directory, tmp_path / "another machine"
    assert world.renew().counts["due"] == 0
    world.connection.execute("UPDATE catfeeder_cron.oauth_tokens SET lease_until = now()")
    assert world.renew().counts == {"due": 1, "renewed": 0, "needs_reauth": 0, "failed": 0, "postponed": 1}
    world.state_directory = here
    assert world.renew().counts["renewed"] == 1
    assert provider.reused == []


def test_recovery_alone_stores_what_was_left(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"))
    with processes(world) as start, blocked(world) as block:
        provider.script = cutting_off(block, provider)
        process = start()
        wait_until(lambda: world.written_down() == 1)
        process.kill()
        process.wait()
    assert renew_oauth.JOB.recover is not None
    renew_oauth.JOB.recover(world.context())
    assert stored(world, provider) == {"tom"}


def test_a_database_that_is_away_while_answers_come_in_loses_none(world: World, provider: Provider) -> None:
    for number in range(60):
        world.add_link(provider.log_in(f"user{number}"))
    with processes(world) as start, blocked(world) as block:
        provider.script, provider.delay = cutting_off(block, provider, after=10), 0.05
        process = start()
        wait_until(lambda: sum(provider.renewals.values()) > 10)
        time.sleep(1)  # an outage has to last for a while
        asked_meanwhile = len(provider.requests)
        block.end()
        assert process.wait(SOON) == 0
    assert asked_meanwhile < 60
    assert len(stored(world, provider)) == 60
    assert provider.reused == []
    assert world.journals() == []


def test_a_stop_while_the_database_is_away_keeps_the_answers_for_later(world: World, provider: Provider) -> None:
    for number in range(5):
        world.add_link(provider.log_in(f"user{number}"))
    with processes(world) as start, blocked(world) as block:
        provider.script, provider.delay = cutting_off(block, provider), 0.2
        process = start()
        wait_until(lambda: sum(provider.renewals.values()) == 5)
        process.send_signal(signal.SIGTERM)
        process.wait(SOON)
    assert len(world.journals()) == 1
    assert (world.journals()[0].stat().st_mode & 0o777) == 0o600
    world.renew()
    assert len(stored(world, provider)) == 5
    assert provider.reused == []


def test_a_frozen_process_reads_the_answer_in_its_socket_before_its_deadline_takes_effect(
    world: World, provider: Provider
) -> None:
    world.add_link(provider.log_in("tom"))
    provider.delay = 0.3
    with processes(world) as start:
        (world.state_directory.parent / "config.toml").write_text(
            f'[database]\nurl = "{world.url}"\n[oauth]\nrequest_timeout = 1\n'
        )
        process = start()
        wait_until(lambda: provider.requests)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: provider.renewals)
        time.sleep(1.5)  # past its deadline
        process.send_signal(signal.SIGCONT)
        assert process.wait(SOON) == 0
    assert stored(world, provider) == {"tom"}
    assert len(provider.requests) == 1


def kill_some(provider: Provider, start: Callable[[], Copy], victims: int, kills: list[float]) -> list[Copy]:
    """Start four processes and kill so many at random, each in the midst of the requests and replaced by another."""
    running = [start() for _ in range(4)]

    def is_asking() -> bool:
        return len(provider.requests) > asked or all(one.poll() is not None for one in running)

    for _ in range(victims):
        asked = len(provider.requests)
        eventually(is_asking)
        time.sleep(random.uniform(0.05, 0.5))
        victim = random.randrange(4)
        if running[victim].poll() is None:
            running[victim].kill()
            kills.append(time.monotonic())
            running[victim].wait()
        running[victim] = start()
    return running


@pytest.mark.parametrize(
    ("rounds", "users", "victims"),
    [pytest.param(2, 150, 3, id="short"), pytest.param(10, 1500, 6, id="long", marks=pytest.mark.proof)],
)
def test_four_processes_that_are_killed_at_random_lose_nothing_and_double_nothing(
    world: World, serve: Serve, rounds: int, users: int, victims: int
) -> None:
    """In each round everything is due once. Lost may be only what nobody had read when its process was killed."""
    answered: dict[str, float] = {}

    def answer(request: Request) -> Raw:
        raw = provider.renew(request)
        for user in provider.renewals:
            if provider.renewals[user] > before.get(user, 0) and user not in answered:
                answered[user] = time.monotonic()
        return raw

    provider = serve(delay=0.05, script=answer)
    world.add_provider(provider)
    for number in range(users):
        world.add_link(provider.log_in(f"user{number}"))
    before: dict[str, int] = {}
    lost: set[str] = set()
    kills: list[float] = []
    with processes(world) as start:
        for _ in range(rounds):
            world.let_time_pass()
            world.connection.execute("UPDATE \"ActiveOauths\" SET token_expiration = now() + interval '1 min'")
            before = dict(provider.renewals)
            answered.clear()
            running = kill_some(provider, start, victims, kills)
            for process in running:
                process.wait(2 * SOON)
            start().wait(2 * SOON)
            doubled = {user for user, count in provider.renewals.items() if count - before.get(user, 0) > 1}
            assert not doubled
            now_lost = set(answered) - stored(world, provider) - lost
            for user in now_lost:
                after = [answered[user] - killed for killed in kills]
                assert any(-UNREAD_SECONDS < seconds < UNREAD_SECONDS for seconds in after), user
            lost |= now_lost
    assert kills
    assert len(lost) <= len(kills) * 8
    assert world.leases() == 0
    assert world.journals() == []
    print(f"{sum(provider.renewals.values())} renewals, {len(kills)} kills, {len(lost)} unread answers lost")
