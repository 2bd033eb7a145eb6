"""A provider that fails in every way, over a real connection: what each costs, and what it must not cost."""

import asyncio
import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest

from catfeeder_cron.errors import JobAborted
from catfeeder_cron.renewal import providers
from tests.integration.oauth.conftest import World
from tests.integration.oauth.provider import Provider, Raw, Request, reply

Serve = Callable[..., Provider]
FORM = {"content-type": "application/x-www-form-urlencoded"}
GZIP = {"content-encoding": "gzip", "content-type": "application/json"}


def cut_off(data: bytes) -> Raw:
    """A response that promises more than it sends."""
    return Raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\nConnection: close\r\n\r\n" + data
    )


async def drip(request: Request) -> Raw:
    await asyncio.sleep(3600)
    return Raw()


DEAD = [
    reply(400, {"error": "invalid_grant", "error_description": "revoked"}),
    reply(400, b"error=invalid_grant", FORM),
    reply(200, {"error": "bad_refresh_token"}),
    reply(200, b"error=bad_refresh_token&error_description=gone", FORM),
    reply(400, gzip.compress(b'{"error": "invalid_grant"}', mtime=0), GZIP),
    reply(400, {"status": 400, "message": "Invalid refresh token"}),
    reply(400, {"error": "invalid_request", "error_description": 'Invalid "refresh_token" in request.'}),
]
REFUSED = [
    reply(400, {"error": "unauthorized_client"}),
    reply(400, b"error=invalid_client", FORM),
    reply(302, b"", {"location": "/elsewhere"}),
    reply(307, b"", {"location": "/elsewhere"}),
    reply(404, b"<html>not here"),
]
TROUBLE = [
    reply(500, b"<html>oops"),
    reply(503, {"error": "temporarily_unavailable"}),
    reply(200, {"error": "internal_failure"}),
    reply(403, b"<html>rate limited"),
]
AMBIGUOUS = [
    reply(200, b"<html>Sign in", {"content-type": "text/html"}),
    reply(200, b'{"access_token": "ne', {"content-type": "application/json"}),
    reply(200, {"token_type": "Bearer"}),
    reply(200, b"scope=all", FORM),
    reply(200, b'{"x": "' + b"a" * 300_000 + b'"}'),
    reply(200, gzip.compress(b"[" * 5_000_000), GZIP),
    reply(200, gzip.compress(json.dumps({"access_token": "new"}).encode(), mtime=0)[:-6], GZIP),
    reply(200, b"[" * 50_000),
    reply(502, b"<html>bad gateway"),
    reply(504, b""),
    cut_off(b'{"access_token": "new"'),
    cut_off(b""),
    Raw(reset=True),
    Raw(b"not HTTP at all\r\n\r\n", reset=False),
    Raw(b""),
]


AS_BODY = {"client_auth": "body", "concurrency": 2}


def run_with(
    world: World, serve: Serve, answer: Raw, links: int = 1, configured: dict[str, Any] = AS_BODY
) -> tuple[Provider, list[int], dict[str, int]]:
    faulty = serve(script=lambda _: answer)
    world.add_provider(faulty)
    world.settings["providers"] = {"acme": configured}
    ids = [world.add_link(f"refresh-{number}-0123456789") for number in range(links)]
    return faulty, ids, world.renew().counts


def test_a_dead_token_is_left_alone_until_there_is_a_new_login(world: World, serve: Serve) -> None:
    faulty = [serve(script=lambda _, answer=answer: answer) for answer in DEAD]
    for number, each in enumerate(faulty):
        world.add_provider(each, f"provider-{number}")
        world.add_link(f"refresh-{number}", f"provider-{number}")

    report = world.renew()

    as_wanted = {"due": 1, "renewed": 0, "needs_reauth": 1, "failed": 0, "postponed": 0}
    assert report.by_provider == {f"provider-{number}": as_wanted for number in range(len(faulty))}
    assert report.outcome == "succeeded"

    world.let_time_pass()
    assert world.renew().counts["due"] == 0
    assert [len(each.requests) for each in faulty] == [1] * len(faulty)

    world.connection.execute("UPDATE \"ActiveOauths\" SET refresh_link = 'after the new login'")
    for each in faulty:
        each.script = lambda _: reply(200, {"access_token": "alive", "expires_in": 60})
    assert world.renew().counts["renewed"] == len(faulty)


def test_a_token_that_somebody_else_has_renewed_meanwhile_is_not_dead(world: World, serve: Serve) -> None:
    def rotated_elsewhere(request: Request) -> Raw:
        world.connection.execute("UPDATE \"ActiveOauths\" SET refresh_link = 'theirs', token = 'theirs'")
        return DEAD[0]

    world.add_provider(serve(script=rotated_elsewhere))
    world.add_link("ours")
    counts = world.renew().counts
    assert (counts["needs_reauth"], counts["failed"]) == (0, 0)
    world.let_time_pass()
    assert world.renew(dry_run=True).counts["would_renew"] == 1


@pytest.mark.parametrize("answer", REFUSED, ids=range(len(REFUSED)))
def test_a_provider_that_refuses_us_is_paused_and_no_user_blamed(world: World, serve: Serve, answer: Raw) -> None:
    faulty, _, counts = run_with(world, serve, answer, links=9)
    assert counts == {"due": 9, "renewed": 0, "needs_reauth": 0, "failed": 0, "postponed": 9}
    report = world.reports[-1]
    assert report.outcome == "failed"
    assert report.reason is not None
    assert report.reason.startswith("nothing could be renewed: acme: ")
    asked = len(faulty.requests)
    assert asked <= 3
    assert all(request.path == "/token" for request in faulty.requests)

    assert world.renew().counts == counts
    assert world.renew().outcome == "failed"
    assert len(faulty.requests) == asked

    faulty.script = lambda _: reply(200, {"access_token": "alive"})
    world.connection.execute("UPDATE \"UserOauthConnection\" SET client_secret = 'corrected'")
    assert world.renew().counts["renewed"] == 9


def test_pauses_grow_and_end_with_the_first_answer(world: World, serve: Serve) -> None:
    faulty, _, _ = run_with(world, serve, REFUSED[0])

    def paused_for() -> float:
        row = world.connection.execute(
            "SELECT extract(epoch FROM paused_until - now())::float8 FROM catfeeder_cron.oauth_providers"
        ).fetchone()
        assert row is not None
        return row[0] or 0.0

    pauses = [paused_for()]
    for _ in range(3):
        world.let_time_pass()
        world.renew()
        pauses.append(paused_for())
    assert all(1.5 < later / earlier < 2.6 for earlier, later in pairwise(pauses))

    world.let_time_pass()
    faulty.script = lambda _: reply(200, {"access_token": "alive"})
    assert world.renew().counts["renewed"] == 1
    assert paused_for() == 0


def test_the_other_providers_go_on(world: World, serve: Serve, provider: Provider) -> None:
    world.add_provider(serve(script=lambda _: REFUSED[0]), "broken")
    world.add_link("x", "broken")
    id = world.add_link(provider.log_in("tom"))
    report = world.renew()
    assert report.outcome == "succeeded"
    assert report.counts == {"due": 2, "renewed": 1, "needs_reauth": 0, "failed": 0, "postponed": 1}
    assert world.link(id).token == provider.access_tokens["tom"]


@pytest.mark.parametrize("answer", TROUBLE, ids=range(len(TROUBLE)))
def test_trouble_makes_rows_and_then_the_provider_back_off(world: World, serve: Serve, answer: Raw) -> None:
    faulty, _, counts = run_with(world, serve, answer, links=20)
    assert counts["due"] == 20
    assert counts["needs_reauth"] == 0
    assert counts["failed"] == len(faulty.requests) <= 5
    assert counts["postponed"] == 20 - counts["failed"]
    assert world.reports[-1].outcome == "succeeded"

    asked = len(faulty.requests)
    world.renew()
    assert len(faulty.requests) == asked
    world.let_time_pass()
    faulty.script = lambda _: reply(200, {"access_token": "alive"})
    assert world.renew().counts["renewed"] == 20


def test_an_answer_that_tells_nothing_is_asked_for_once_more_and_then_left_for_minutes(
    world: World, serve: Serve
) -> None:
    begun = time.monotonic()
    faulty = [serve(script=lambda _, answer=answer: answer) for answer in AMBIGUOUS]
    for number, each in enumerate(faulty):
        world.add_provider(each, f"provider-{number}")
        world.add_link(f"refresh-{number}", f"provider-{number}")

    report = world.renew()

    as_wanted = {"due": 1, "renewed": 0, "needs_reauth": 0, "failed": 1, "postponed": 0}
    assert report.by_provider == {f"provider-{number}": as_wanted for number in range(len(faulty))}
    assert [len(each.requests) for each in faulty] == [2] * len(faulty)
    assert all(len({request.form["refresh_token"] for request in each.requests}) == 1 for each in faulty)
    assert time.monotonic() - begun >= 1

    world.connection.execute("UPDATE catfeeder_cron.oauth_tokens SET not_before = NULL")
    assert world.renew().counts["postponed"] == len(faulty)
    assert [len(each.requests) for each in faulty] == [2] * len(faulty)


def test_the_second_try_saves_the_token(world: World, serve: Serve) -> None:
    faulty, ids = [serve(), serve()], []
    for each, first in zip(faulty, (AMBIGUOUS[0], Raw(reset=True)), strict=True):
        each.script = lambda request, each=each, first=first: first if len(each.requests) == 1 else each.renew(request)
        world.add_provider(each, each.url)
        ids.append(world.add_link(each.log_in("tom"), each.url))
    assert world.renew().counts["renewed"] == len(faulty)
    assert [world.link(id).token for id in ids] == [each.access_tokens["tom"] for each in faulty]


def test_a_silent_provider_costs_its_deadline_and_no_more(world: World, serve: Serve) -> None:
    world.settings["request_timeout"] = 1
    silences: list[Any] = [lambda _: Raw(hang=True), drip, lambda _: Raw(b"HTTP/1.1 200 OK\r\n", hang=True)]
    for number, silence in enumerate(silences):
        world.add_provider(serve(script=silence), f"provider-{number}")
        world.add_link("r", f"provider-{number}")
    assert world.renew().counts["failed"] == len(silences)
    assert world.reports[-1].outcome == "succeeded"


def test_a_partial_answers_refresh_token_is_stored(world: World, serve: Serve) -> None:
    for number, rest in enumerate(({}, {"access_token": ""})):
        world.add_provider(
            serve(script=lambda _, rest=rest: reply(200, {"refresh_token": "next", **rest})), f"p{number}"
        )
        world.add_link("r", f"p{number}")
    assert world.renew().counts == {"due": 2, "renewed": 0, "needs_reauth": 0, "failed": 2, "postponed": 0}
    for id in (1, 2):
        assert (world.link(id).token, world.link(id).refresh_link) == ("old-access", "next")
    assert world.renew().counts["postponed"] == 2  # they back off


@pytest.mark.parametrize(("told", "shortest", "longest"), [({"retry-after": "120"}, 120, 120), ({}, 50, 70)])
def test_429_pauses_the_provider_for_as_long_as_it_says(
    world: World, serve: Serve, told: dict[str, str], shortest: float, longest: float
) -> None:
    before = world.now()
    faulty, _, counts = run_with(world, serve, reply(429, b"", told), links=10)
    assert counts == {"due": 10, "renewed": 0, "needs_reauth": 0, "failed": 0, "postponed": 10}
    assert world.reports[-1].outcome == "succeeded"
    assert len(faulty.requests) <= 3
    paused_until = world.paused_until()
    assert paused_until is not None
    assert before + timedelta(seconds=shortest) <= paused_until <= world.now() + timedelta(seconds=longest)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_provider_that_asks_for_a_short_rest_is_waited_for(world: World, serve: Serve, concurrency: int) -> None:
    """Else one that takes twenty requests at a time would get twenty per run, and the links behind them would die."""
    rests, refused = [0.0], Counter[int]()  # when each rest ends; how often it was disturbed

    def twenty_at_a_time(request: Request) -> Raw:
        now = time.monotonic()
        if now < rests[-1] or sum(provider.renewals.values()) >= 20 * len(rests):
            if now >= rests[-1]:
                rests.append(now + 1)
            refused[len(rests)] += 1
            return reply(429, b"", {"retry-after": "1"})
        return provider.renew(request)

    provider = serve(script=twenty_at_a_time)
    world.settings["providers"] = {"acme": {"concurrency": concurrency}}
    world.add_provider(provider)
    for number in range(70):
        world.add_link(provider.log_in(f"user{number}"))

    report = world.renew()

    assert report.outcome == "succeeded"
    assert 70 - 3 * concurrency <= report.counts["renewed"] == len(provider.renewals) < 70
    assert report.counts["postponed"] == 70 - len(provider.renewals)
    assert max(refused.values()) <= concurrency, "no more than what was in flight when the rest began"
    # Nothing is asked for twice in a run.
    assert len(provider.requests) == len({request.form["refresh_token"] for request in provider.requests}) == 70
    provider.script = None
    world.let_time_pass()
    assert world.renew().counts["renewed"] == report.counts["postponed"]


@pytest.mark.parametrize("asked_for", ["30", "31"])
def test_only_a_short_rest_is_waited_for(world: World, serve: Serve, asked_for: str) -> None:
    """Both sides of the bound. The stop comes when the run has begun to rest, which then ends."""

    def one_then_rest(request: Request) -> Raw:
        if not provider.renewals:
            return provider.renew(request)
        return reply(429, b"", {"retry-after": asked_for})

    provider = serve(script=one_then_rest)
    world.settings["providers"] = {"acme": {"concurrency": 1}}
    context = world.context()
    world.add_provider(provider)
    for number in range(5):
        world.add_link(provider.log_in(f"user{number}"))
    if asked_for == "30":
        threading.Timer(3, lambda: context.stop.set(JobAborted("the process was asked to stop"))).start()

    report = world.run(context)

    assert report.outcome == ("aborted" if asked_for == "30" else "succeeded")
    assert len(provider.requests) == 2


def test_a_rest_that_another_process_makes_longer_is_not_waited_for(world: World, serve: Serve) -> None:
    def one_then_rest(request: Request) -> Raw:
        if not provider.renewals:
            return provider.renew(request)
        providers.pause(world.database, acme, providers.throttled("slow down", 3600))
        return reply(429, b"", {"retry-after": "1"})

    provider = serve(script=one_then_rest)
    world.settings["providers"] = {"acme": {"concurrency": 1}}
    world.add_provider(provider)
    context, acme = world.context(), world.known_provider()
    for number in range(5):
        world.add_link(provider.log_in(f"user{number}"))

    report = world.run(context)

    assert (report.outcome, report.counts["renewed"], report.counts["postponed"]) == ("succeeded", 1, 4)


def test_rests_do_not_make_a_later_pause_longer(world: World, serve: Serve) -> None:
    def rest_twice_then_refuse(request: Request) -> Raw:
        number = len(provider.requests)
        if number > 4:
            return reply(401, {"error": "invalid_client"})
        return provider.renew(request) if number % 2 else reply(429, b"", {"retry-after": "1"})

    provider = serve(script=rest_twice_then_refuse)
    world.settings["providers"] = {"acme": {"concurrency": 1, "client_auth": "body"}}
    world.add_provider(provider)
    for number in range(10):
        world.add_link(provider.log_in(f"user{number}"))
    world.renew()
    pauses = world.connection.execute(
        "SELECT extract(epoch FROM paused_until - now())::float8, failures FROM catfeeder_cron.oauth_providers"
    ).fetchall()
    assert [failures for _, failures in pauses] == [1]
    assert 250 < pauses[0][0] < 340


def test_a_stop_waits_for_no_rest(world: World, serve: Serve) -> None:
    world.settings["providers"] = {"acme": {"concurrency": 1}}
    context = world.context()

    def one_then_rest(request: Request) -> Raw:
        if not provider.renewals:
            return provider.renew(request)
        context.stop.set(JobAborted("the process was asked to stop"))
        return reply(429, b"", {"retry-after": "30"})

    provider = serve(script=one_then_rest)
    world.add_provider(provider)
    for number in range(5):
        world.add_link(provider.log_in(f"user{number}"))

    report = world.run(context)

    assert (report.outcome, report.counts["renewed"], report.counts["postponed"]) == ("aborted", 1, 4)
    rest_ends = world.paused_until()
    assert rest_ends is not None
    assert world.now() < rest_ends
    assert world.leases() == 0


def test_a_provider_that_asks_for_a_rest_at_once_gets_it(world: World, serve: Serve) -> None:
    faulty, _, counts = run_with(world, serve, reply(429, b"", {"retry-after": "1"}), 10, AS_BODY | {"concurrency": 1})
    assert len(faulty.requests) == 1, "and the run does not wait for its end"
    assert counts["postponed"] == 10


def test_a_provider_that_nobody_answers_for_is_no_fault_of_ours(world: World, serve: Serve) -> None:
    world.add_provider("http://127.0.0.1:1/token")
    world.add_provider("https://no-such-host.invalid/token", "nowhere")
    world.add_provider(serve(script=lambda _: Raw()), "silent")
    for name in ("acme", "nowhere", "silent"):
        world.add_link("r", name)
    report = world.renew()
    assert (report.outcome, report.counts["failed"]) == ("succeeded", 3)
    assert report.provider_reasons == {
        "acme": "no connection: connection refused",
        "nowhere": "no connection: its name could not be looked up",
        "silent": "the connection broke: it hung up without an answer",
    }


def test_when_most_tokens_are_called_dead_the_provider_is_suspected(world: World, serve: Serve) -> None:
    faulty, _, counts = run_with(world, serve, DEAD[0], links=40)
    asked = len(faulty.requests)
    assert 20 <= asked < 25
    assert counts == {"due": 40, "renewed": 0, "needs_reauth": 0, "failed": asked, "postponed": 40 - asked}

    world.let_time_pass()
    faulty.script = lambda _: reply(200, {"access_token": "alive"})
    assert world.renew().counts["renewed"] == 40


def test_many_dead_tokens_do_not_starve_the_good_ones_behind_them(world: World, serve: Serve) -> None:
    """The oldest are the likeliest to be dead: those of users who were gone while no daemon ran, say."""
    some = serve()
    world.add_provider(some)
    for number in range(25):
        world.add_link(f"nobody knows {number}", left="-90 days")
    for number in range(60):
        world.add_link(some.log_in(f"user{number}"))
    assert world.renew().counts["needs_reauth"] == 0
    for _ in range(2):
        world.let_time_pass()
        world.renew()
    assert sum(some.renewals.values()) == 60
    assert sum(report.counts["needs_reauth"] for report in world.reports) == 25


def test_a_few_dead_tokens_among_many_are_believed(world: World, serve: Serve) -> None:
    some = serve()
    world.add_provider(some)
    for number in range(40):
        world.add_link(some.log_in(f"user{number}") if number % 3 else f"nobody knows {number}")
    assert world.renew().counts == {"due": 40, "renewed": 26, "needs_reauth": 14, "failed": 0, "postponed": 0}


def test_the_other_method_is_tried_once_and_remembered(world: World, serve: Serve) -> None:
    def basic_only(request: Request) -> Raw:
        return faulty.renew(request) if "authorization" in request.headers else reply(401, {"error": "invalid_client"})

    faulty = serve(script=basic_only)
    world.add_provider(faulty, "discord")  # which has the body as its preset
    world.add_link(faulty.log_in("tom"), "discord")
    assert world.renew().counts["renewed"] == 1
    assert len(faulty.requests) == 2

    world.add_link(faulty.log_in("tim"), "discord")
    assert world.renew().counts["renewed"] == 1
    assert len(faulty.requests) == 3


def test_a_wrong_secret_costs_few_requests(world: World, serve: Serve) -> None:
    faulty, _, counts = run_with(world, serve, reply(401, {"error": "invalid_client"}), links=12, configured={})
    assert len(faulty.requests) <= 9  # one by the other method; concurrency is 8
    assert counts["postponed"] == 12
    pauses = world.connection.execute("SELECT refused, failures FROM catfeeder_cron.oauth_providers").fetchall()
    assert pauses == [(True, 1)]


def test_the_configured_method_is_the_only_one(world: World, serve: Serve) -> None:
    faulty, _, _ = run_with(world, serve, reply(401, {"error": "invalid_client"}))
    assert len(faulty.requests) == 1
    assert world.reports[-1].outcome == "failed"


def test_no_user_ever_carries_another_ones_cookie(world: World, serve: Serve) -> None:
    cookies = {"set-cookie": "session=of-the-first-user; Path=/"}
    faulty = serve(script=lambda _: reply(200, {"access_token": "new"}, cookies))
    world.add_provider(faulty)
    for number in range(12):
        world.add_link(f"r{number}")
    assert world.renew().counts["renewed"] == 12
    assert not any("cookie" in request.headers for request in faulty.requests)


def test_plain_http_to_another_machine_is_not_sent(world: World) -> None:
    world.add_provider("http://auth.example.org/token")
    world.add_link("r")
    report = world.renew()
    assert report.outcome == "failed"
    assert report.reason is not None
    assert "allow_http" in report.reason
