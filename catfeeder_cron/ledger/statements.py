"""The SQL statements of the ledger. Each is atomic, and any number of processes may run it at once."""

# A server that lost its last seconds may have lost the record of a run that is under way. Until a heartbeat has noticed
# that, no run begins that must be the only one; nor before all processes that lived have sent another heartbeat, which
# records their runs anew (11 seconds leave time for those that the server has lost, too). One that is cut off has ended
# its runs after 25 seconds. Where the server went back further than that, nothing tells who lives. It gives the seconds
# until a claim may be tried again: two where only heartbeats are awaited.
UNSETTLED = """
        SELECT CASE WHEN l.since > now() - %(settle_least)s
                    THEN extract(epoch FROM l.since + %(settle_least)s - now()) ELSE 2 END::float8 AS seconds
        FROM catfeeder_cron.lineage l
        WHERE NOT %(shared)s
          AND (l.reason IS NOT NULL AND l.since > now() - %(settle)s AND l.since < now() + %(early)s
                   AND (l.since > now() - %(settle_least)s OR l.known_until < l.since - %(dead_after)s
                        OR EXISTS (SELECT FROM catfeeder_cron.daemons d
                                   WHERE d.heartbeat_at BETWEEN l.since - %(dead_after)s AND l.since - interval '1 us'))
               OR %(lineage)s::uuid IS NOT NULL AND NOT (l.id = %(lineage)s AND l.counter >= %(lineage_counter)s
                                                         AND l.server = catfeeder_cron.server()))"""

# One row of `schedule` serves as the lock: the process that moves it on from the value that all have read has claimed
# the slot. The same statement accounts for the slots before it, so that a death in between leaves none of them out.
# A slot of a job that is paused, or still running, becomes a missed one. A stretch grows while its reason stays.
# No slot is claimed more than five seconds (EARLY_SECONDS) before its time by the server's clock, whatever the claiming
# machine's clock says.
CLAIM = """
    WITH unsettled AS MATERIALIZED ({unsettled}
          AND %(trigger)s::text IS NOT NULL),
    advanced AS (
        INSERT INTO catfeeder_cron.schedule AS s (job, trigger, accounted_until)
        SELECT %(job)s, %(described)s, %(slot)s
        WHERE %(slot)s <= now() + %(early)s AND NOT EXISTS (SELECT FROM unsettled)
        ON CONFLICT (job) DO UPDATE
        SET accounted_until = excluded.accounted_until, retry_slot = NULL, retry_at = NULL
        WHERE s.accounted_until = %(known)s
        RETURNING accounted_until),
    account AS (
        SELECT accounted_until FROM advanced
        UNION ALL
        SELECT accounted_until FROM catfeeder_cron.schedule
        WHERE job = %(job)s AND NOT EXISTS (SELECT FROM advanced)),
    ours AS (
        SELECT FROM account
        WHERE %(trigger)s::text IS NOT NULL AND accounted_until >= %(slot)s
          AND (%(shared)s OR EXISTS (SELECT FROM advanced))),
    paused AS (
        SELECT 'paused' || coalesce(': ' || because, '') AS reason FROM catfeeder_cron.pauses
        WHERE job IN (%(job)s, '*') AND (until IS NULL OR until > now()) ORDER BY job DESC LIMIT 1),
    claimed AS (
        INSERT INTO catfeeder_cron.job_runs (job, slot, trigger, shared, host, pid, daemon)
        SELECT %(job)s, %(slot)s, %(trigger)s, %(shared)s, %(host)s, %(pid)s, %(daemon)s FROM ours
        WHERE NOT EXISTS (SELECT FROM paused)
        ON CONFLICT DO NOTHING
        RETURNING run_id),
    stretch AS (
        SELECT first, last, missed, reason, false AS shared
        FROM unnest(%(firsts)s::timestamptz[], %(lasts)s::timestamptz[], %(counts)s::int[], %(reasons)s::text[])
             AS gap(first, last, missed, reason)
        WHERE EXISTS (SELECT FROM advanced)
        UNION ALL
        SELECT %(slot)s, %(slot)s, 1, coalesce(paused.reason, %(still_running)s), %(shared)s AND paused.reason IS NULL
        FROM ours LEFT JOIN paused ON true
        WHERE NOT EXISTS (SELECT FROM claimed) AND (paused.reason IS NULL OR EXISTS (SELECT FROM advanced))
          AND NOT EXISTS (SELECT FROM catfeeder_cron.job_runs
                          WHERE job = %(job)s AND slot = %(slot)s AND daemon = %(daemon)s)),
    grown AS (
        UPDATE catfeeder_cron.job_runs r
        SET last_slot = s.last, missed = r.missed + s.missed, finished_at = now()
        FROM (SELECT * FROM stretch ORDER BY first LIMIT 1) s
        WHERE %(grows)s AND r.job = %(job)s AND r.last_slot = %(known)s AND r.missed IS NOT NULL AND r.reason = s.reason
          AND r.shared = s.shared AND (NOT s.shared OR r.daemon = %(daemon)s)
        RETURNING s.first),
    added AS (
        INSERT INTO catfeeder_cron.job_runs
            (job, slot, last_slot, missed, trigger, shared, outcome, reason, host, pid, daemon, finished_at)
        SELECT %(job)s, first, last, missed, 'schedule', shared, 'skipped', reason,
               %(host)s, %(pid)s, %(daemon)s, now()
        FROM stretch WHERE first NOT IN (SELECT first FROM grown)
        ON CONFLICT DO NOTHING)
    SELECT (SELECT accounted_until FROM account), (SELECT run_id FROM claimed), %(slot)s > now() + %(early)s,
           (SELECT seconds FROM unsettled)""".replace("{unsettled}", UNSETTLED)

# A run without a slot. A manual run ignores a pause; a woken run respects it, as runs of the schedule do.
CLAIM_WITHOUT_SLOT = """
    INSERT INTO catfeeder_cron.job_runs (job, trigger, shared, host, pid, daemon)
    SELECT %(job)s, %(trigger)s, %(shared)s, %(host)s, %(pid)s, %(daemon)s
    WHERE (%(trigger)s = 'manual'
           OR NOT EXISTS (SELECT FROM catfeeder_cron.pauses
                          WHERE job IN (%(job)s, '*') AND (until IS NULL OR until > now())))
      AND NOT EXISTS ({unsettled})
    ON CONFLICT DO NOTHING
    RETURNING run_id""".replace("{unsettled}", UNSETTLED)

# The row of `schedule` is locked until the run is added, so only one of many processes gets it. A pause makes it a
# skipped run; while the job runs (by hand), the retry waits.
CLAIM_RETRY = """
    WITH due AS MATERIALIZED (
        SELECT retry_slot FROM catfeeder_cron.schedule
        WHERE job = %(job)s AND retry_at <= now() AND accounted_until = retry_slot AND NOT EXISTS ({unsettled})
        FOR UPDATE),
    paused AS (
        SELECT 'paused' || coalesce(': ' || because, '') AS reason FROM catfeeder_cron.pauses
        WHERE job IN (%(job)s, '*') AND (until IS NULL OR until > now()) ORDER BY job DESC LIMIT 1),
    added AS (
        INSERT INTO catfeeder_cron.job_runs (job, slot, trigger, host, pid, daemon, outcome, reason, finished_at)
        SELECT %(job)s, retry_slot, 'retry', %(host)s, %(pid)s, %(daemon)s,
               CASE WHEN paused.reason IS NOT NULL THEN 'skipped' END, paused.reason,
               CASE WHEN paused.reason IS NOT NULL THEN now() END
        FROM due LEFT JOIN paused ON true
        ON CONFLICT DO NOTHING
        RETURNING run_id, outcome),
    done AS (
        UPDATE catfeeder_cron.schedule SET retry_slot = NULL, retry_at = NULL
        WHERE job = %(job)s AND EXISTS (SELECT FROM added))
    SELECT run_id FROM added WHERE outcome IS NULL""".replace("{unsettled}", UNSETTLED)

# The run that keeps this process from running the job: of a shared job only a run of this process does.
UNDER_WAY = """
    SELECT host, pid, started_at FROM catfeeder_cron.job_runs
    WHERE job = %(job)s AND outcome IS NULL AND (NOT shared OR daemon = %(daemon)s)"""

# It may be repeated after a lost answer: then it finds the run closed and changes nothing. A server that lost its last
# seconds may have given the number to another process's run, or to none. A run between slots takes in the run before it
# if that was between slots, too: a job that always has something due would add a row every second.
CLOSE = """
    WITH earlier AS (
        SELECT before.* FROM catfeeder_cron.job_runs this, LATERAL (
            SELECT * FROM catfeeder_cron.job_runs r
            WHERE r.job = this.job AND r.daemon = this.daemon AND r.run_id < this.run_id
            ORDER BY r.run_id DESC LIMIT 1) before
        WHERE this.run_id = %(run_id)s AND this.daemon = %(daemon)s AND this.outcome IS NULL
          AND %(outcome)s = 'succeeded'
          AND (this.slot, this.trigger) IS NOT DISTINCT FROM (NULL, 'schedule')
          AND (before.slot, before.trigger, before.outcome) IS NOT DISTINCT FROM (NULL, 'schedule', 'succeeded')
          AND before.started_at > now() - interval '1 hour'
        FOR UPDATE OF this),
    taken_in AS (
        DELETE FROM catfeeder_cron.job_runs WHERE run_id IN (SELECT run_id FROM earlier)
        RETURNING started_at, runs, counts),
    closed AS (
        UPDATE catfeeder_cron.job_runs
        SET outcome = %(outcome)s, reason = %(reason)s, error = %(error)s, finished_at = now(),
            started_at = coalesce((SELECT started_at FROM taken_in), started_at),
            runs = runs + coalesce((SELECT runs FROM taken_in), 0),
            counts = (SELECT coalesce(jsonb_object_agg(key, number), '{}')
                      FROM (SELECT key, sum(value::bigint) AS number
                            FROM (SELECT * FROM jsonb_each_text(%(counts)s)
                                  UNION ALL
                                  SELECT each.* FROM taken_in, jsonb_each_text(taken_in.counts) AS each) both_of
                            GROUP BY key) summed)
        WHERE run_id = %(run_id)s AND daemon = %(daemon)s AND job = coalesce(%(job)s, job) AND outcome IS NULL
        RETURNING job, slot),
    retry AS (
        SELECT job, slot, now() + interval '1 second' * (1 + random() / 4)
                   * least(3600, extract(epoch FROM %(retry_after)s::interval) * 2 ^ least(made, 30)) AS retry_at
        FROM closed, LATERAL (SELECT count(*) AS made FROM catfeeder_cron.job_runs r
                              WHERE r.job = closed.job AND r.slot = closed.slot AND r.trigger = 'retry') AS so_far
        WHERE %(outcome)s IN ('failed', 'timed_out') AND made < %(retries)s),
    awaited AS (
        UPDATE catfeeder_cron.schedule s SET retry_slot = retry.slot, retry_at = retry.retry_at
        FROM retry WHERE s.job = retry.job AND s.accounted_until = retry.slot
            AND (retry.retry_at < %(retry_before)s OR %(retry_before)s::timestamptz IS NULL)
        RETURNING s.retry_at - now() AS retry_in)
    SELECT found.run_id IS NULL,
           found.outcome IS NOT NULL AND (found.outcome, found.reason) IS DISTINCT FROM (%(outcome)s, %(reason)s::text),
           (SELECT retry_in FROM awaited)
    FROM (VALUES (0)) AS always LEFT JOIN catfeeder_cron.job_runs found
         ON found.run_id = %(run_id)s AND found.daemon = %(daemon)s AND found.job = coalesce(%(job)s, found.job)"""

# The record of a run whose row the server has lost. Its slot may have been run again meanwhile: then the row has none.
# A row that was made so before is known by its end, which is to the microsecond what the process says it is.
RESTORE = """
    WITH slots AS (
        SELECT CASE WHEN NOT EXISTS (SELECT FROM catfeeder_cron.job_runs r
                                     WHERE r.job = %(job)s AND r.slot = %(slot)s AND NOT r.shared) THEN %(slot)s END)
    INSERT INTO catfeeder_cron.job_runs
        (job, slot, trigger, shared, outcome, reason, counts, error, started_at, finished_at, host, pid, daemon)
    SELECT %(job)s, (SELECT * FROM slots)::timestamptz, %(trigger)s, %(shared)s, %(outcome)s, %(reason)s, %(counts)s,
           %(error)s, %(started_at)s, %(started_at)s::timestamptz + %(duration)s, %(host)s, %(pid)s, %(daemon)s
    WHERE NOT EXISTS (SELECT FROM catfeeder_cron.job_runs
                      WHERE run_id = %(run_id)s AND daemon = %(daemon)s AND job = %(job)s
                        AND slot IS NOT DISTINCT FROM %(slot)s)
      AND NOT EXISTS (SELECT FROM catfeeder_cron.job_runs
                      WHERE finished_at = %(started_at)s::timestamptz + %(duration)s AND daemon = %(daemon)s
                        AND job = %(job)s)
    ON CONFLICT DO NOTHING"""

# It says that this process lives, closes the runs of dead ones, and reads its own open runs and the retries due soon.
# History went back, or may have, where the server is another one, on another timeline or with another copy of this
# table; or where it knows of fewer heartbeats than this process has heard of, or has sent itself (its row in `daemons`
# is `own`), unless another process has noticed that before: then the lineage has a newer id than this one knows. A
# heartbeat that this process has given up may arrive after later ones, hence greatest().
# However a silence came about (an outage, a restart, a failover, a clock that was set), nobody counts as dead before
# all had time to be heard of again. A heartbeat in the future is none: the clock was set back since. A dead process's
# statement that the server still works on is a run under way; its backend is known by its application_name.
BEAT = """
    WITH here AS MATERIALIZED (SELECT catfeeder_cron.server() AS server),
    known AS MATERIALIZED (
        SELECT l.server, l.counter, l.written_at, here.server AS server_now, coalesce(own.beats, 0) AS own_beats,
               l.server <> here.server OR (l.counter < %(counter)s OR coalesce(own.beats, 0) < %(beats)s)
                   AND (%(lineage)s::uuid IS NULL OR l.id = %(lineage)s OR l.since <= %(since)s) AS went_back
        FROM catfeeder_cron.lineage l CROSS JOIN here LEFT JOIN catfeeder_cron.daemons own ON own.daemon = %(daemon)s
        FOR UPDATE OF l),
    lineage AS (
        UPDATE catfeeder_cron.lineage l SET
            id = CASE WHEN went_back THEN gen_random_uuid() ELSE l.id END,
            since = CASE WHEN went_back THEN now() ELSE l.since END,
            known_until = CASE WHEN went_back THEN known.written_at ELSE l.known_until END,
            reason = CASE
                WHEN known.server <> server_now
                THEN format('the database is %%s now and was %%s before (system/timeline/copy)',
                            server_now, known.server)
                WHEN known.counter < %(counter)s
                THEN format('the database knows of %%s heartbeats, and there were %%s',
                            known.counter, %(counter)s::bigint)
                WHEN own_beats < %(beats)s
                THEN format('the database has lost %%s heartbeats of pid %%s on %%s',
                            %(beats)s::bigint - own_beats, %(pid)s::int, %(host)s::text)
                ELSE l.reason END,
            server = server_now,
            counter = greatest(known.counter, %(counter)s) + 1,
            written_at = now(),
            heard_since = CASE
                WHEN went_back OR now() > l.written_at + %(silence)s OR now() < l.written_at - %(early)s
                THEN now() ELSE l.heard_since END
        FROM known
        RETURNING l.id, l.since, l.reason, l.server, l.counter, l.heard_since),
    beat AS (
        INSERT INTO catfeeder_cron.daemons AS d (daemon, kind, host, pid, version, beats)
        VALUES (%(daemon)s, %(kind)s, %(host)s, %(pid)s, %(version)s, %(beats)s + 1)
        ON CONFLICT (daemon) DO UPDATE SET heartbeat_at = now(), kind = excluded.kind,
            beats = greatest(d.beats, excluded.beats)),
    reopened AS (
        INSERT INTO catfeeder_cron.job_runs (job, slot, trigger, shared, started_at, host, pid, daemon)
        SELECT run.job, run.slot, run.trigger, run.shared, now() - run.age, %(host)s, %(pid)s, %(daemon)s
        FROM (SELECT * FROM unnest(%(run_ids)s::bigint[], %(jobs)s::text[], %(slots)s::timestamptz[],
                                   %(triggers)s::text[], %(shareds)s::bool[], %(ages)s::interval[])
                  AS r (run_id, job, slot, trigger, shared, age)) run
        WHERE NOT EXISTS (SELECT FROM catfeeder_cron.job_runs r
                          WHERE r.run_id = run.run_id AND r.daemon = %(daemon)s AND r.job = run.job)
        ON CONFLICT DO NOTHING
        RETURNING run_id, job),
    dead AS MATERIALIZED (
        SELECT r.run_id, r.job, r.daemon FROM catfeeder_cron.job_runs r
        WHERE r.outcome IS NULL AND r.daemon <> %(daemon)s
          AND (SELECT heard_since FROM lineage) < now() - %(dead_after)s
          AND NOT EXISTS (SELECT FROM catfeeder_cron.daemons d
                          WHERE d.daemon = r.daemon AND d.heartbeat_at > now() - %(dead_after)s
                            AND d.heartbeat_at <= now() + %(early)s)
        FOR UPDATE OF r SKIP LOCKED),
    working AS MATERIALIZED (
        SELECT dead.run_id, dead.job, a.pid FROM dead JOIN pg_catalog.pg_stat_activity a
            ON a.application_name = format('catfeeder-cron run %%s %%s', dead.run_id, left(dead.daemon::text, 8))),
    closed AS (
        UPDATE catfeeder_cron.job_runs r
        SET outcome = 'aborted', reason = %(died)s, finished_at = now()
        WHERE r.outcome IS NULL AND r.run_id IN (SELECT run_id FROM dead EXCEPT SELECT run_id FROM working)
        RETURNING r.job, r.host, r.pid, r.run_id),
    gone AS (
        DELETE FROM catfeeder_cron.daemons WHERE daemon IN (
            SELECT d.daemon FROM catfeeder_cron.daemons d
            WHERE d.heartbeat_at < now() - interval '1 day' AND d.daemon <> %(daemon)s FOR UPDATE SKIP LOCKED))
    SELECT array(SELECT run_id FROM catfeeder_cron.job_runs WHERE outcome IS NULL AND daemon = %(daemon)s),
           array(SELECT format('%%s (run %%s on %%s, pid %%s)', job, run_id, host, pid) FROM closed),
           (SELECT jsonb_object_agg(job, extract(epoch FROM retry_at - now())) FROM catfeeder_cron.schedule
            WHERE retry_at < now() + 2 * %(heartbeat)s AND accounted_until = retry_slot),
           (SELECT jsonb_object_agg(pid, format('%%s (run %%s)', job, run_id)) FROM working),
           (SELECT jsonb_object_agg(job, run_id) FROM reopened),
           clock_timestamp(), id, since, reason, server, counter
    FROM lineage"""

# Ends the statement that a dead process's run has left behind, and its locks. Refused for a backend of another role.
END_BACKEND = "SELECT pg_terminate_backend(%(pid)s)"

# Ends what the server still does for a run of this process whose connection broke, and waits until that has ended.
END_BACKENDS_OF = """
    SELECT count(*) FILTER (WHERE has_ended), count(*) FILTER (WHERE NOT has_ended)
    FROM (SELECT pg_terminate_backend(pid, 5000) AS has_ended FROM pg_catalog.pg_stat_activity
          WHERE application_name = %(name)s AND pid <> pg_backend_pid()) each"""

IDENTITY = "SELECT id FROM catfeeder_cron.oauth_identity LIMIT 1"

LEAVE = "DELETE FROM catfeeder_cron.daemons WHERE daemon = %(daemon)s"

# A changed trigger starts a new account: its slots before the change were never due. An account that lies in the
# future, where a wrong clock has left it, starts anew as well.
REGISTER = """
    WITH dropped AS (DELETE FROM catfeeder_cron.schedule WHERE job = ANY(%(disabled)s))
    INSERT INTO catfeeder_cron.schedule AS s (job, trigger, accounted_until)
    SELECT job, trigger, now() FROM unnest(%(jobs)s::text[], %(triggers)s::text[]) AS new(job, trigger) ORDER BY job
    ON CONFLICT (job) DO UPDATE SET
        trigger = excluded.trigger,
        retry_slot = CASE WHEN s.trigger = excluded.trigger THEN s.retry_slot END,
        retry_at = CASE WHEN s.trigger = excluded.trigger THEN s.retry_at END,
        accounted_until = CASE WHEN s.trigger <> excluded.trigger OR s.accounted_until > now() + %(early)s
                               THEN excluded.accounted_until ELSE s.accounted_until END
    RETURNING job, accounted_until"""

# It goes by the end of a run, because a stretch of missed slots still grows.
FORGET = """
    DELETE FROM catfeeder_cron.job_runs WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM catfeeder_cron.job_runs
        WHERE finished_at < now() - %(keep)s
          AND (outcome NOT IN ('failed', 'aborted', 'timed_out') OR finished_at < now() - 3 * %(keep)s)
        LIMIT 5000 FOR UPDATE SKIP LOCKED))"""
