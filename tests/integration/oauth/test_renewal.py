"""What is due, what becomes of a row, and what is told of a run; with a provider that behaves."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg

from catfeeder_cron.errors import JobAborted
from tests.integration.oauth.conftest import World
from tests.integration.oauth.provider import Provider, Raw, Request, reply

Serve = Callable[..., Provider]

# Tokens that end within minutes are due in every run, which they are not where a slot comes before.
SELDOM = timedelta(days=1000)


def test_a_due_token_is_renewed_stored_and_not_due_any_more(world: World, provider: Provider) -> None:
    id = world.add_link(provider.log_in("tom"))

    report = world.renew()

    assert (report.outcome, report.reason) == ("succeeded", None)
    assert report.counts == {"due": 1, "renewed": 1, "needs_reauth": 0, "failed": 0, "postponed": 0}
    link = world.link(id)
    assert link.token == provider.access_tokens["tom"]
    assert provider.live == {link.refresh_link: "tom"}
    assert link.token_lifespan == 3600
    assert link.seconds_left is not None
    assert 3590 < link.seconds_left <= 3600
    assert world.journals() == []
    assert world.leases() == 0

    assert world.renew().counts["due"] == 0
    assert provider.renewals == {"tom": 1}


def test_due_is_what_ends_before_the_next_run_and_the_margin(world: World, provider: Provider) -> None:
    """The next run is at most 30 minutes away, the margin 5; a token's quarter caps it."""
    due = {world.add_link(provider.log_in(f"due-{left}"), left=left) for left in ("-1 day", "0 s", "4 min")}
    not_due = {world.add_link(provider.log_in(f"not-{left}"), left=left) for left in ("36 min", "1 day")}
    context = world.context()
    assert context.schedule is not None
    row = world.connection.execute("SELECT now()").fetchone()
    assert row is not None
    to_slot = context.schedule.next_after(row[0]) - row[0]
    due.add(world.add_link(provider.log_in("in the margin"), left=f"{(to_slot + timedelta(minutes=4)).seconds} s"))
    after_slot = f"{(to_slot + timedelta(seconds=90)).seconds} s"
    not_due.add(world.add_link(provider.log_in("a quarter is a minute"), left=after_slot, span=240))

    report = world.run(context)

    assert report.counts["renewed"] == len(due)
    assert all((world.link(id).token != "old-access") == (id in due) for id in due | not_due)


def test_what_has_nothing_to_renew_is_never_touched_and_an_unknown_end_is_learned(
    world: World, provider: Provider
) -> None:
    left_alone = [
        world.add_link(provider.log_in("forever"), left="-1 day", span=0),
        world.add_link("", left="-1 day"),
        world.add_link(None, left="-1 day"),
    ]
    unknown = world.add_link(provider.log_in("unknown"), left=None)
    always, never = world.add_link(provider.log_in("always")), world.add_link(provider.log_in("never"))
    for id, end in ((always, "-infinity"), (never, "infinity")):  # no intervals before PostgreSQL 17
        world.connection.execute('UPDATE "ActiveOauths" SET token_expiration = %s WHERE id = %s', [end, id])

    assert world.renew().counts["renewed"] == 2

    assert all(world.link(id).token == "old-access" for id in [*left_alone, never])
    assert world.link(unknown).seconds_left is not None
    assert world.link(always).token != "old-access"


def test_the_oldest_expiry_goes_first(world: World, provider: Provider) -> None:
    world.settings["providers"] = {"acme": {"concurrency": 1}}
    for minutes in (3, 1, 4, 2):
        world.add_link(provider.log_in(f"user-{minutes}"), left=f"{minutes} min")
    world.add_link(provider.log_in("user-9"), left=None)
    world.renew()
    asked = [request.form["refresh_token"].split("-")[2] for request in provider.requests]
    assert asked == ["1", "2", "3", "4", "9"]


def test_a_refresh_token_that_is_not_replaced_stays(world: World, serve: Serve) -> None:
    steady = serve(script=lambda _: reply(200, {"access_token": "new", "expires_in": 60}))
    world.add_provider(steady, "google")
    id = world.add_link("the-lasting-one", "google")
    world.renew()
    link = world.link(id)
    assert (link.token, link.refresh_link, link.token_lifespan) == ("new", "the-lasting-one", 60)


def test_a_lifetime_that_is_not_said_is_the_usual_one_and_does_not_replace_the_known(
    world: World, serve: Serve
) -> None:
    silent = serve(script=lambda _: reply(200, {"access_token": "new"}))
    world.add_provider(silent, "github")
    id = world.add_link("r", "github", span=1234)
    world.renew()
    link = world.link(id)
    assert link.token_lifespan == 1234
    assert link.seconds_left is not None
    assert 8 * 3600 - 10 < link.seconds_left <= 8 * 3600


def test_a_newer_login_is_never_overwritten(world: World, provider: Provider) -> None:
    id = world.add_link(provider.log_in("tom"))

    def answer_late(request: Request) -> Raw:
        world.connection.execute(
            "UPDATE \"ActiveOauths\" SET token = 'fresh', refresh_link = 'newer' WHERE id = %s", [id]
        )
        return provider.renew(request)

    provider.script = answer_late
    report = world.renew()
    assert (world.link(id).token, world.link(id).refresh_link) == ("fresh", "newer")
    assert report.counts["renewed"] == 0
    assert world.journals() == []


def test_a_row_that_is_deleted_meanwhile_is_no_trouble(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"))

    def answer_late(request: Request) -> Raw:
        world.connection.execute('DELETE FROM "ActiveOauths"')
        return provider.renew(request)

    provider.script = answer_late
    assert world.renew().outcome == "succeeded"
    assert world.journals() == []


def test_an_answer_whose_row_is_locked_waits_and_lets_the_others_by(world: World, provider: Provider) -> None:
    """The lock goes when the other answer is stored; were they stored together, it would never go."""
    first, second = world.add_link(provider.log_in("first")), world.add_link(provider.log_in("second"))

    with psycopg.connect(world.url) as web_server:

        def lock_then_answer(request: Request) -> Raw:
            if "first" in request.form["refresh_token"]:
                web_server.execute('SELECT FROM "ActiveOauths" WHERE id = %s FOR UPDATE', [first])
            return provider.renew(request)

        def let_go(done: int, total: int) -> None:
            if world.link(second).token == provider.access_tokens.get("second"):
                web_server.rollback()

        provider.script = lock_then_answer
        report = world.renew(progress=let_go, timeout=15)
    assert report.counts["renewed"] == 2
    assert world.link(first).token == provider.access_tokens["first"]


def test_an_answer_that_the_column_cannot_hold_stays_in_the_journal_until_it_can(
    world: World, provider: Provider
) -> None:
    world.connection.execute('ALTER TABLE "ActiveOauths" ALTER token TYPE varchar(12)')
    id, other = world.add_link(provider.log_in("tom")), world.add_link(provider.log_in("tim"))
    report = world.renew()
    assert (report.counts["failed"], report.counts["renewed"]) == (2, 0)
    assert len(world.journals()) == 1

    world.connection.execute('ALTER TABLE "ActiveOauths" ALTER token TYPE text')
    world.renew()
    assert world.link(id).token == provider.access_tokens["tom"]
    assert world.link(other).token == provider.access_tokens["tim"]
    assert provider.renewals == {"tom": 1, "tim": 1}
    assert world.journals() == []


def test_timestamps_without_a_zone_are_taken_as_utc(world: World, provider: Provider) -> None:
    world.connection.execute("SET timezone = 'Pacific/Kiritimati'")
    world.connection.execute(
        "ALTER TABLE \"ActiveOauths\" ALTER token_expiration TYPE timestamp USING token_expiration AT TIME ZONE 'UTC'"
    )
    insert = 'INSERT INTO "ActiveOauths" (token, token_expiration, token_lifespan, refresh_link, service_id)'
    values = " SELECT 'old-access', (now() AT TIME ZONE 'UTC') + %s::interval, 3600, %s, id FROM \"Services\""
    world.connection.execute(insert + values, ["1 min", provider.log_in("due")])
    world.connection.execute(insert + values, ["2 h", provider.log_in("later")])
    assert world.renew().counts["due"] == 1
    row = world.connection.execute(
        "SELECT count(*) FROM \"ActiveOauths\" WHERE token <> 'old-access' AND"
        " token_expiration - (now() AT TIME ZONE 'UTC') BETWEEN interval '59 min' AND interval '1 h'"
    ).fetchone()
    assert row == (1,)


def test_requests_are_bounded_by_provider_and_in_all(world: World, serve: Serve) -> None:
    one, two = serve(delay=0.05), serve(delay=0.05)
    world.settings |= {"concurrency": 6, "providers": {"one": {"concurrency": 4}}}
    for name, each in (("one", one), ("two", two)):
        world.add_provider(each, name)
        for number in range(30):
            world.add_link(each.log_in(f"{name}{number}"), name)
    report = world.renew()
    assert report.counts["renewed"] == 60
    assert one.most_under_way <= 4
    assert two.most_under_way <= 6
    assert report.by_provider["one"] == {"due": 30, "renewed": 30, "needs_reauth": 0, "failed": 0, "postponed": 0}


def test_a_dry_run_counts_by_provider_and_asks_nobody(world: World, provider: Provider) -> None:
    world.add_provider(provider, "other")
    for name in ("acme", "acme", "other"):
        world.add_link(provider.log_in("x"), name)
    report = world.renew(dry_run=True)
    assert (report.outcome, report.counts) == ("succeeded", {"would_renew": 3})
    assert {name: counts["would_renew"] for name, counts in report.by_provider.items()} == {"acme": 2, "other": 1}
    assert provider.requests == []
    assert world.journals() == []


def test_a_dry_run_needs_no_schema_of_the_daemon(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("x"))
    world.connection.execute("DROP SCHEMA catfeeder_cron CASCADE")
    assert world.renew(dry_run=True).counts == {"would_renew": 1}


def test_a_stop_sends_nothing_new_and_stores_what_is_in_flight(world: World, provider: Provider) -> None:
    world.settings["providers"] = {"acme": {"concurrency": 3}}
    ids = [world.add_link(provider.log_in(f"user{number}")) for number in range(20)]
    context = world.context()

    def stop_then_answer(request: Request) -> Raw:
        context.stop.set(JobAborted("the process was asked to stop"))
        return provider.renew(request)

    provider.script, provider.delay = stop_then_answer, 0.2
    report = world.run(context)

    assert (report.outcome, report.reason) == ("aborted", "the process was asked to stop")
    assert len(provider.requests) == 3
    assert report.counts == {"due": 20, "renewed": 3, "needs_reauth": 0, "failed": 0, "postponed": 17}
    assert sum(world.link(id).token in provider.access_tokens.values() for id in ids) == 3
    assert world.leases() == 0
    assert world.journals() == []

    provider.script, provider.delay = None, 0
    assert world.renew().counts["renewed"] == 17
    assert provider.reused == []


def test_the_jobs_timeout_leaves_nothing_in_flight(world: World, provider: Provider) -> None:
    world.settings |= {"request_timeout": 3, "providers": {"acme": {"concurrency": 1}}}
    provider.delay = 0.3
    for number in range(20):
        world.add_link(provider.log_in(f"user{number}"))
    report = world.renew(timeout=4)
    assert report.outcome == "timed_out"
    assert report.counts["renewed"] == len(provider.requests)
    assert report.counts["postponed"] == 20 - len(provider.requests)


def test_without_a_place_for_the_journal_nothing_is_sent(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"))
    world.state_directory.write_text("a file")
    report = world.renew()
    assert report.outcome == "failed"
    assert report.reason is not None
    assert "STATE_DIRECTORY" in report.reason
    assert provider.requests == []
    dry = world.renew(dry_run=True)
    assert dry.outcome == "failed"
    assert dry.reason is not None
    assert f"{world.state_directory} is no directory" in dry.reason


def test_a_missing_table_is_named(world: World, provider: Provider) -> None:
    world.connection.execute('ALTER TABLE "Services" RENAME TO elsewhere')
    report = world.renew()
    assert report.outcome == "failed"
    assert report.reason is not None
    assert '"public"."Services"' in report.reason


def test_a_link_whose_service_has_no_provider_is_postponed_and_named(world: World, provider: Provider) -> None:
    world.connection.execute("INSERT INTO \"Services\" (name) VALUES ('orphan')")
    world.add_link("r", "orphan")
    report = world.renew()
    assert report.outcome == "failed"
    assert report.reason == "nothing could be renewed: orphan: its service has no row in the table of providers"
    assert report.counts == {"due": 1, "renewed": 0, "needs_reauth": 0, "failed": 0, "postponed": 1}


def test_what_is_left_alone_says_why(world: World, provider: Provider) -> None:
    """The report by provider names how many rows back off or are in doubt, and until when; a dry run as well."""
    world.add_link(provider.log_in("tom"))
    failing, doubtful = world.add_link(provider.log_in("tim")), world.add_link(provider.log_in("tam"))
    world.connection.execute(
        "INSERT INTO catfeeder_cron.oauth_tokens (oauth_id, failures, not_before, sent, sent_at)"
        " SELECT id, 1, CASE id WHEN %s THEN '2099-01-01 12:04:31Z'::timestamptz END,"
        " CASE id WHEN %s THEN sha256(convert_to(refresh_link, 'UTF8')) END, now()"
        ' FROM "ActiveOauths" WHERE id = ANY (%s)',
        [failing, doubtful, [failing, doubtful]],
    )
    why = (
        "1 back off after a failure, the first until 12:04:31 UTC; "
        "1 were sent, with no known answer, and rest for at most 10 min"
    )

    dry, done = world.renew(dry_run=True), world.renew()

    assert dry.provider_reasons == done.provider_reasons == {"acme": why}
    assert done.as_json()["providers"]["acme"] == {**done.by_provider["acme"], "reason": why}
    assert (done.counts["renewed"], done.counts["postponed"]) == (1, 2)


def test_tokens_that_live_shorter_than_the_interval_are_renewed_once_in_a_run(world: World, provider: Provider) -> None:
    provider.expires_in = 60
    for number in range(40):
        world.add_link(provider.log_in(f"user{number}"), span=60)
    for _ in range(2):
        assert world.renew(every=SELDOM).counts == {
            "due": 40,
            "renewed": 40,
            "needs_reauth": 0,
            "failed": 0,
            "postponed": 0,
        }
    assert len(provider.requests) == 80


def test_daemons_that_work_for_one_slot_renew_such_a_token_once(world: World, provider: Provider) -> None:
    provider.expires_in = 60
    world.add_link(provider.log_in("tom"), span=60)
    slot = datetime.now(UTC) - timedelta(seconds=2)

    assert world.renew(slot=slot, every=SELDOM).counts["renewed"] == 1
    assert world.renew(slot=slot, every=SELDOM).counts["due"] == 0
    assert world.renew(slot=datetime.now(UTC), every=SELDOM).counts["renewed"] == 1


def test_a_lifespan_that_contradicts_the_expiry_keeps_no_token_from_being_renewed(
    world: World, provider: Provider
) -> None:
    world.add_link(provider.log_in("tom"), left="5 min", span=1)
    assert world.renew(every=SELDOM).counts["renewed"] == 1


def test_a_row_that_somebody_has_locked_is_postponed(world: World, provider: Provider) -> None:
    locked = world.add_link(provider.log_in("tom"))
    world.add_link(provider.log_in("tim"))
    with psycopg.connect(world.url) as web:
        web.execute('SELECT FROM "ActiveOauths" WHERE id = %s FOR UPDATE', [locked])
        assert world.renew().counts == {"due": 2, "renewed": 1, "needs_reauth": 0, "failed": 0, "postponed": 1}
    assert world.renew().counts["renewed"] == 1


def test_a_loopback_that_is_named_is_asked_as_well(world: World, serve: Serve) -> None:
    each = serve()
    world.add_provider(each.url.replace("127.0.0.1", "localhost"))
    world.add_link(each.log_in("tom"))
    assert world.renew().counts["renewed"] == 1
