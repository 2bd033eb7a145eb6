"""What goes wrong around the requests: full disks, locked rows, odd rows, several processes, providers' whims."""

import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from catfeeder_cron.config import DatabaseSettings
from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.schema.application import create_tables
from catfeeder_cron.errors import JobAborted
from catfeeder_cron.jobs import renew_oauth
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.claims import Claimer, TokenClaim
from catfeeder_cron.renewal.entries import Entry
from catfeeder_cron.renewal.failures import Failure, settle
from catfeeder_cron.renewal.journal import new_journal
from catfeeder_cron.renewal.links import Links, Window
from catfeeder_cron.renewal.recovery import journal_folder
from tests.integration.oauth.conftest import World
from tests.integration.oauth.disasters import blocked, break_disk, cutting_off, processes, stored, wait_until
from tests.integration.oauth.provider import Provider, Raw, Request, reply
from tests.support.waiting import SOON

Serve = Callable[..., Provider]


FULL_DISK = 100


def test_on_a_full_disk_nothing_is_sent_whose_answer_could_not_be_kept(world: World, provider: Provider) -> None:
    for number in range(3):
        world.add_link(provider.log_in(f"user{number}"))
    with processes(world, FULL_DISK) as start:
        assert start().wait(SOON) == 84
    assert provider.requests == []
    assert world.leases() == 0
    assert world.renew().counts["renewed"] == 3


def test_a_disk_that_gets_full_during_a_run_ends_it_before_an_answer_is_lost(world: World, serve: Serve) -> None:
    """The answers are so long that they use up the space that was reserved at first."""

    def fill_then_answer(request: Request) -> Raw:
        if len(long.requests) == 8:
            used = max(path.stat().st_size for path in world.journals())
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (used, used))
        number = request.form["refresh_token"].partition("-")[0]
        return reply(200, {"access_token": f"a-{number}", "refresh_token": f"{number}-{'x' * 25_000}"})

    long = serve(script=fill_then_answer, delay=0.1)
    world.add_provider(long)
    for number in range(200):
        world.add_link(f"{number}-old")
    with processes(world, logs=False) as start:
        process = start()
        assert process.wait(SOON) == 84
    renewed = world.connection.execute("SELECT count(*) FROM \"ActiveOauths\" WHERE refresh_link LIKE '%x'").fetchone()
    assert renewed == (len(long.requests),)
    assert 8 <= len(long.requests) < 200


def test_an_answer_that_fits_into_no_journal_is_stored_however_long_the_database_is_away(
    world: World, provider: Provider
) -> None:
    for number in range(3):
        world.add_link(provider.log_in(f"user{number}"))
    with processes(world, logs=False) as start:
        with blocked(world) as block:
            cut_off = cutting_off(block, provider)

            def break_disk_then_answer(request: Request) -> Raw:
                break_disk(process)
                answer = cut_off(request)
                assert isinstance(answer, Raw)
                return answer

            provider.script, provider.delay = break_disk_then_answer, 0.5
            process = start()
            wait_until(lambda: sum(provider.renewals.values()) == 3)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)  # it does not give up
        assert process.wait(SOON) == 84
    assert len(stored(world, provider)) == 3


def test_nor_is_one_lost_whose_row_is_locked(world: World, provider: Provider) -> None:
    ids = [world.add_link(provider.log_in(f"user{number}")) for number in range(3)]
    with processes(world, logs=False) as start:
        web = psycopg.connect(world.url)

        def lock_then_answer(request: Request) -> Raw:
            break_disk(process)
            if not provider.renewals:
                web.execute('SELECT FROM "ActiveOauths" WHERE id = %s FOR UPDATE', [ids[0]])
            return provider.renew(request)

        provider.script, provider.delay = lock_then_answer, 0.5
        process = start()
        wait_until(lambda: len(stored(world, provider)) == 2)
        web.close()
        assert process.wait(SOON) == 84
    assert len(stored(world, provider)) == 3


def test_an_answer_whose_row_is_locked_at_the_take_over_is_not_asked_for_again(
    world: World, provider: Provider
) -> None:
    spent = provider.log_in("tom")
    id = world.add_link(spent)
    answer = provider.renew(Request("", {}, {"refresh_token": spent}))
    assert answer.data
    [(refresh_token, _)] = provider.live.items()
    row = world.connection.execute(
        "INSERT INTO catfeeder_cron.oauth_tokens (oauth_id, owner, lease_until, sent, sent_at)"
        " SELECT id, %s, now(), sha256(convert_to(refresh_link, 'UTF8')), now() - interval '1 h' FROM \"ActiveOauths\""
        " RETURNING encode(sent, 'hex')",
        [owner := uuid4()],
    ).fetchone()
    assert row is not None
    with new_journal(journal_folder(world.context()), owner) as journal:
        journal.append(Entry(id, row[0], time.time(), provider.access_tokens["tom"], refresh_token, 3600, True, None))

    with psycopg.connect(world.url) as web:
        web.execute('SELECT FROM "ActiveOauths" WHERE id = %s FOR UPDATE', [id])
        assert world.renew().counts["postponed"] == 1
    here, world.state_directory = world.state_directory, world.state_directory / "of another machine"
    assert world.renew().counts["postponed"] == 1
    world.state_directory = here
    world.renew()

    assert provider.requests == []
    assert stored(world, provider) == {"tom"}


def test_a_row_that_is_locked_for_a_moment_is_looked_at_again(world: World, provider: Provider) -> None:
    locked = world.add_link(provider.log_in("tom"))
    world.add_link(provider.log_in("tim"))
    with psycopg.connect(world.url) as web:
        web.execute('SELECT FROM "ActiveOauths" WHERE id = %s FOR UPDATE', [locked])

        def unlock_then_answer(request: Request) -> Raw:
            web.rollback()
            return provider.renew(request)

        provider.script = unlock_then_answer
        assert world.renew().counts["renewed"] == 2


def test_a_foreign_keys_check_keeps_no_row_from_being_renewed(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"))
    with psycopg.connect(world.url) as web:
        web.execute('SELECT FROM "ActiveOauths" FOR KEY SHARE')
        assert world.renew().counts["renewed"] == 1


def test_claims_that_grew_old_are_taken_again(world: World, serve: Serve) -> None:
    slow = serve(delay=0.2)
    world.settings |= {"request_timeout": 1, "lease": 1.5, "concurrency": 2}
    world.add_provider(slow)
    for number in range(24):
        world.add_link(slow.log_in(f"user{number}"))
    assert world.renew().counts == {"due": 24, "renewed": 24, "needs_reauth": 0, "failed": 0, "postponed": 0}
    assert len(slow.requests) == 24


# Statements that would wait for a locked row longer than a moment; a sequence counts what is rolled back, too.
COUNT_LONG_WAITS = """
    CREATE SEQUENCE long_waits;
    CREATE FUNCTION count_long_wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF current_setting('lock_timeout')::interval > interval '50 ms' THEN PERFORM nextval('long_waits'); END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER count_long_wait BEFORE UPDATE ON "ActiveOauths" EXECUTE FUNCTION count_long_wait()"""


def test_locked_rows_do_not_hold_up_a_stop_one_by_one(world: World, provider: Provider) -> None:
    for number in range(40):
        world.add_link(provider.log_in(f"user{number}"))
    world.settings["providers"] = {"acme": {"concurrency": 32}}
    context = world.context()
    world.connection.execute(COUNT_LONG_WAITS)
    with psycopg.connect(world.url) as web:

        def lock_and_stop(request: Request) -> Raw:
            if not provider.renewals:
                web.execute('SELECT FROM "ActiveOauths" FOR UPDATE')
            context.stop.set(JobAborted("the process was asked to stop"))
            return provider.renew(request)

        provider.script = lock_and_stop
        report = world.run(context)
    received = sum(provider.renewals.values())
    assert received > 20
    long_waits = world.connection.execute("SELECT last_value FROM long_waits WHERE is_called").fetchone()
    assert long_waits is not None
    assert long_waits[0] <= received / 2
    assert report.counts["postponed"] == report.counts["due"] == 40
    assert report.reason is not None
    assert f"{received} answers could not be stored; they are kept in the journal" in report.reason
    world.renew()
    assert len(stored(world, provider)) == 40


def test_a_token_that_alone_is_refused_starves_no_other(world: World, serve: Serve) -> None:
    """The oldest row, so the first to be asked for; what is refused is not said to be its user's fault."""

    def refuse_one(request: Request) -> Raw:
        if request.form["refresh_token"] == "odd":
            return reply(400, {"error": "unauthorized_client"})
        return some.renew(request)

    some = serve(script=refuse_one)
    world.settings["providers"] = {"acme": {"concurrency": 1}}
    world.add_provider(some)
    world.add_link("odd", left="-1 day")
    for number in range(20):
        world.add_link(some.log_in(f"user{number}"))

    first = world.renew()
    world.let_time_pass()
    second = world.renew()

    assert (first.outcome, first.counts["renewed"]) == ("failed", 0)
    assert second.counts == {"due": 21, "renewed": 20, "needs_reauth": 0, "failed": 0, "postponed": 1}
    assert world.paused_until() is None


def test_unknown_errors_of_some_users_do_not_stop_the_others(world: World, serve: Serve) -> None:
    def odd_for_some(request: Request) -> Raw:
        if request.form["refresh_token"].startswith("odd"):
            return reply(400, {"error": "account_locked"})
        return some.renew(request)

    some = serve(script=odd_for_some)
    world.settings["providers"] = {"acme": {"concurrency": 1}}
    world.add_provider(some)
    for number in range(5):
        world.add_link(f"odd{number}", left="-1 day")
    for number in range(20):
        world.add_link(some.log_in(f"user{number}"))
    assert world.renew().counts == {"due": 25, "renewed": 20, "needs_reauth": 0, "failed": 5, "postponed": 0}


def test_a_run_that_is_stopped_while_the_database_is_away_has_not_succeeded(world: World, provider: Provider) -> None:
    """Nor does what it had claimed stay out of reach: by its journal the next run frees it."""
    for number in range(20):
        world.add_link(provider.log_in(f"user{number}"))
    world.settings["providers"] = {"acme": {"concurrency": 2}}
    context = world.context()
    with blocked(world) as block:

        def cut_off_then_stop(_: Request) -> Raw:
            block()
            context.stop.set(JobAborted("the process was asked to stop"))
            return reply(429, b"", {"retry-after": "3000"})

        provider.script = cut_off_then_stop
        report = world.run(context)
    assert report.outcome == "failed"
    assert report.counts["due"] == report.counts["postponed"] >= 2
    provider.script = None
    world.connection.execute("UPDATE catfeeder_cron.oauth_providers SET paused_until = NULL")
    assert world.renew().counts["renewed"] == 20


def test_nor_has_one_that_could_claim_nothing(world: World, provider: Provider) -> None:
    world.add_link(provider.log_in("tom"))
    with blocked(world) as block:

        def cut_off(_done: int, _total: int) -> None:
            block()
            threading.Timer(1, lambda: context.stop.set(JobAborted("the process was asked to stop"))).start()

        context = world.context(progress=cut_off)
        report = world.run(context)
    assert (report.outcome, report.reason) == ("aborted", "the process was asked to stop")
    assert provider.requests == []


def test_a_provider_that_is_paused_makes_no_finished_run_an_aborted_one(
    world: World, serve: Serve, provider: Provider
) -> None:
    world.add_provider(serve(script=lambda _: reply(429, b"", {"retry-after": "3000"})), "other")
    world.add_link("r", "other")
    world.renew()
    world.add_link(provider.log_in("tom"))
    context = world.context()

    def stop_in_the_end(request: Request) -> Raw:
        context.stop.set(JobAborted("the process was asked to stop"))
        return provider.renew(request)

    provider.script = stop_in_the_end
    report = world.run(context)
    assert (report.outcome, report.counts["renewed"], report.counts["postponed"]) == ("succeeded", 1, 1)


def test_what_was_called_dead_in_an_earlier_round_says_nothing_of_this_one(world: World, provider: Provider) -> None:
    for number in range(25):
        world.add_link(f"in flight elsewhere {number}")
    world.connection.execute(
        "INSERT INTO catfeeder_cron.oauth_tokens (oauth_id, refused, failures)"
        " SELECT id, sha256(convert_to(refresh_link, 'UTF8')), 1 FROM \"ActiveOauths\""
    )
    links, slot = Links.find(world.database, world.context().tables), datetime.now(UTC)
    window = Window(slot + timedelta(hours=1), timedelta(0), slot)
    acme = world.known_provider()
    elsewhere = Claimer(links, window, uuid4(), timedelta(minutes=2), "acme", acme.fingerprint)
    assert len(elsewhere.claim(world.context(), 100)) == 25

    world.add_link("gone")
    for number in range(12):
        world.add_link(provider.log_in(f"user{number}"))
    assert world.renew(slot=slot).counts["needs_reauth"] == 1


def test_a_claim_takes_what_is_free_now_and_not_what_was_when_it_began(world: World, provider: Provider) -> None:
    """Its snapshot is older than another process's claim, which it waits for."""
    id = world.add_link("r")
    world.connection.execute("INSERT INTO catfeeder_cron.oauth_tokens (oauth_id) VALUES (%s)", [id])
    slot = datetime.now(UTC)
    window = Window(slot + timedelta(hours=1), timedelta(0), slot)
    acme, links = world.known_provider(), Links.find(world.database, world.context().tables)
    claims: list[TokenClaim] = []

    def claim() -> None:
        claimer = Claimer(links, window, uuid4(), timedelta(minutes=2), "acme", acme.fingerprint)
        claims.extend(claimer.claim(world.context(), 10))

    with psycopg.connect(world.url) as other:
        other.execute(
            "UPDATE catfeeder_cron.oauth_tokens SET owner = %s, lease_until = now() + interval '1 min'",
            [uuid4()],
        )
        late = threading.Thread(target=claim)
        late.start()
        waiting = """SELECT FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%oauth_tokens%'"""
        wait_until(lambda: world.connection.execute(waiting).fetchone() is not None)
    late.join()

    assert claims == []


def test_a_corrected_secret_ends_the_pause_for_good_where_the_method_is_learnt(world: World, serve: Serve) -> None:
    def body_with_the_right_secret(request: Request) -> Raw:
        if request.form.get("client_secret") == "right":
            return some.renew(request)
        return reply(401, {"error": "invalid_client"})

    some = serve(script=body_with_the_right_secret)
    world.add_provider(some)  # whose method is taken to be Basic
    world.add_link(some.log_in("tom"))
    assert world.renew().outcome == "failed"
    world.connection.execute("UPDATE \"UserOauthConnection\" SET client_secret = 'right'")
    assert world.renew().counts["renewed"] == 1
    world.add_link(some.log_in("tim"))
    assert world.renew().counts["renewed"] == 1


def test_a_pause_that_another_process_keeps_is_neither_ended_nor_shortened(world: World, provider: Provider) -> None:
    acme = world.known_provider()
    hour, before = timedelta(hours=1), world.now()

    providers.pause(world.database, acme, providers.throttled("slow down", 3600))
    after = world.now()
    providers.pause(world.database, acme, providers.throttled("slow down", 5))
    providers.resume(world.database, acme)

    paused_until = world.paused_until()
    assert paused_until is not None
    assert before <= paused_until - hour <= after


@pytest.mark.parametrize("second", [reply(429, b""), reply(503, b""), reply(401, {"error": "invalid_client"})])
def test_a_doubt_outlives_an_answer_that_does_not_dispel_it(world: World, serve: Serve, second: Raw) -> None:
    """The provider may have rotated at the first request, whatever it says of the second."""
    faulty: Provider = serve()
    faulty.script = lambda _: second if len(faulty.requests) > 1 else reply(502, b"")
    world.settings["providers"] = {"acme": {"client_auth": "basic"}}
    world.add_provider(faulty)
    world.add_link("r")
    assert world.renew().counts["failed"] == 1
    world.connection.execute("UPDATE catfeeder_cron.oauth_tokens SET not_before = NULL")
    world.connection.execute("UPDATE catfeeder_cron.oauth_providers SET paused_until = NULL")
    asked = len(faulty.requests)
    assert world.renew().counts["postponed"] == 1
    assert len(faulty.requests) == asked


def test_it_asks_again_by_the_method_that_was_not_answered(world: World, serve: Serve) -> None:
    def basic_only(request: Request) -> Raw:
        if "authorization" not in request.headers:
            return reply(401, {"error": "invalid_client"})
        return faulty.renew(request) if len(faulty.requests) > 2 else reply(502, b"")

    faulty = serve(script=basic_only)
    world.add_provider(faulty, "discord")  # which has the body as its preset
    world.add_link(faulty.log_in("tom"), "discord")
    assert world.renew().counts["renewed"] == 1
    assert ["authorization" in request.headers for request in faulty.requests] == [False, True, True]


def test_who_waits_to_ask_again_keeps_nobody_from_asking(world: World, serve: Serve, provider: Provider) -> None:
    renewed_by_then: list[int] = []

    def fail(request: Request) -> Raw:
        renewed_by_then.append(sum(provider.renewals.values()))
        return reply(502, b"")

    faulty = serve(script=fail)
    world.settings["concurrency"] = 1
    world.add_provider(faulty, "faulty")
    world.add_link("r", "faulty", left="-1 h")
    for number in range(5):
        world.add_link(provider.log_in(f"user{number}"))
    assert world.renew().counts["renewed"] == 5
    assert renewed_by_then[-1] == 5


def test_processes_that_work_in_one_round_judge_a_provider_together(world: World, serve: Serve) -> None:
    mad = serve(script=lambda _: reply(400, {"error": "invalid_grant"}))
    world.add_provider(mad)
    slot = datetime.now(UTC) - timedelta(seconds=1)
    for number in range(24):
        world.add_link(f"r{number}")
    world.connection.execute(  # what another process has been told of half of them
        "INSERT INTO catfeeder_cron.oauth_tokens (oauth_id, sent_at, refused, failures, not_before)"
        " SELECT id, now(), sha256(convert_to(refresh_link, 'UTF8')), 1, now() + interval '1 h'"
        ' FROM "ActiveOauths" WHERE id <= 12'
    )
    assert world.renew(slot=slot).counts == {
        "due": 24,
        "renewed": 0,
        "needs_reauth": 0,
        "failed": 12,
        "postponed": 12,
    }


def claimed(world: World, owner: object) -> bytes:
    """Have a run claim the only link, and return the hash of its refresh token."""
    row = world.connection.execute(
        "INSERT INTO catfeeder_cron.oauth_tokens (oauth_id, owner, lease_until, sent, sent_at)"
        " SELECT id, %s, now() + interval '1 min', sha256(convert_to(refresh_link, 'UTF8')), now() - interval '1 h'"
        ' FROM "ActiveOauths" RETURNING sent',
        [owner],
    ).fetchone()
    assert row is not None
    return bytes(row[0])


def test_a_token_that_was_called_dead_is_asked_for_by_nobody_until_that_is_decided(
    world: World, provider: Provider
) -> None:
    id, owner = world.add_link("gone"), uuid4()
    sent = claimed(world, owner)
    settle(
        world.database,
        Links.find(world.database, world.context().tables),
        owner,
        [Failure(id, sent, uuid4(), dead=True)],
    )
    assert world.renew().counts["due"] == 0
    assert provider.requests == []


def test_a_late_verdict_does_not_end_another_runs_lease(world: World, provider: Provider) -> None:
    id = world.add_link(provider.log_in("tom"))
    sent = claimed(world, uuid4())
    settle(
        world.database,
        Links.find(world.database, world.context().tables),
        uuid4(),
        [Failure(id, sent, uuid4(), failed=True)],
    )
    assert world.leases() == 1


def test_an_address_that_is_none_stops_its_provider_alone(world: World, provider: Provider) -> None:
    world.add_provider("https://☃.net/token", "odd")
    world.add_link("r", "odd")
    world.add_link(provider.log_in("tom"))
    report = world.renew()
    assert (report.outcome, report.counts["renewed"], report.counts["postponed"]) == ("succeeded", 1, 1)
    assert report.provider_reasons["odd"] == "its token_grabber_base_url is no URL"


def test_no_request_outlives_the_jobs_time(world: World, serve: Serve) -> None:
    world.settings |= {"request_timeout": 3600, "lease": 7200}
    world.add_provider(serve(script=lambda _: Raw(hang=True)))
    world.add_link("r")
    assert world.renew(timeout=2).outcome == "timed_out"


def test_a_token_that_the_database_can_not_hold_stands_in_nobodys_way(
    world: World, provider: Provider, serve: Serve, tmp_path: Path
) -> None:
    """The euro sign in LATIN1. The answer stays in the journal, and is tried again."""
    name = f"{world.connection.info.dbname}_latin"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    world.connection.execute(create.format(sql.Identifier(name)))
    url = make_conninfo(world.url, dbname=name)
    settings = DatabaseSettings.model_validate({"url": url})
    try:
        with Database(settings) as database, psycopg.connect(url, autocommit=True) as connection:
            for _ in (*schema.upgrade(database), *create_tables(database, settings.tables)):
                pass
            latin = World(url, database, connection, tmp_path / "latin", world.loaded)
            odd = serve(script=lambda _: reply(200, {"access_token": "€" * 20, "expires_in": 3600}))
            latin.add_provider(odd, "odd")
            latin.add_provider(provider)
            latin.add_link("r", "odd")
            for number in range(3):
                latin.add_link(provider.log_in(f"user{number}"))
            report = latin.renew()
            assert (report.outcome, report.counts["renewed"], report.counts["failed"]) == ("succeeded", 3, 1)
            latin.add_link(provider.log_in("late"))
            assert latin.renew().counts["renewed"] == 1
            assert len(latin.journals()) == 1
    finally:
        world.connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_a_lifespan_out_of_this_world_is_no_obstacle(world: World, provider: Provider) -> None:
    world.connection.execute('ALTER TABLE "ActiveOauths" ALTER token_lifespan TYPE bigint')
    for lifespan in (-9 * 10**15, 9 * 10**15):
        world.add_link(provider.log_in(f"user{lifespan}"), span=lifespan)
    assert world.renew().counts["renewed"] == 2


def test_what_is_known_of_deleted_links_is_forgotten_at_the_start(world: World, provider: Provider) -> None:
    id, _ = world.add_link(provider.log_in("tom")), world.add_link(provider.log_in("tim"))
    world.renew()
    world.connection.execute('DELETE FROM "ActiveOauths" WHERE id = %s', [id])
    assert renew_oauth.JOB.recover is not None
    renew_oauth.JOB.recover(world.context())
    rows = world.connection.execute("SELECT oauth_id FROM catfeeder_cron.oauth_tokens").fetchall()
    assert rows == [(id + 1,)]
