-- Processes that run jobs. One that has not been heard of for 30 seconds is taken for dead.
CREATE TABLE catfeeder_cron.daemons (
    daemon uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('daemon', 'run-once')),
    host text NOT NULL,
    pid integer NOT NULL,
    version text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now()
);

-- Every slot of a job up to `accounted_until` has its place in job_runs. Moving it on is what claims a slot.
CREATE TABLE catfeeder_cron.schedule (
    job text PRIMARY KEY,
    trigger text NOT NULL,
    accounted_until timestamptz NOT NULL
);

-- A row for every run, and for every stretch of slots that did not run. No outcome: the run is under way.
CREATE TABLE catfeeder_cron.job_runs (
    run_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job text NOT NULL,
    slot timestamptz,                       -- null for a manual run; the first of a stretch of missed slots
    last_slot timestamptz,                  -- of a stretch of missed slots
    missed integer,                         -- how many slots such a stretch has
    trigger text NOT NULL CHECK (trigger IN ('schedule', 'manual', 'catch_up')),
    shared boolean NOT NULL DEFAULT false,  -- a job whose rows are shared out by leases: every daemon works on its slot
    outcome text CHECK (outcome IN ('succeeded', 'failed', 'skipped', 'aborted', 'timed_out')),
    reason text,
    counts jsonb NOT NULL DEFAULT '{}',
    error text,
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    host text NOT NULL,
    pid integer NOT NULL,
    daemon uuid NOT NULL
);

CREATE UNIQUE INDEX job_runs_slot ON catfeeder_cron.job_runs (job, slot) WHERE NOT shared;
CREATE UNIQUE INDEX job_runs_shared_slot ON catfeeder_cron.job_runs (job, slot, daemon) WHERE shared;
-- No job runs twice at once.
CREATE UNIQUE INDEX job_runs_under_way ON catfeeder_cron.job_runs (job) WHERE outcome IS NULL AND NOT shared;
CREATE UNIQUE INDEX job_runs_shared_under_way ON catfeeder_cron.job_runs (job, daemon) WHERE outcome IS NULL AND shared;
CREATE INDEX job_runs_open ON catfeeder_cron.job_runs (daemon) WHERE outcome IS NULL;
CREATE INDEX job_runs_missed ON catfeeder_cron.job_runs (job, last_slot) WHERE missed IS NOT NULL;
CREATE INDEX job_runs_history ON catfeeder_cron.job_runs (job, run_id);
CREATE INDEX job_runs_age ON catfeeder_cron.job_runs (finished_at);

GRANT SELECT ON catfeeder_cron.daemons, catfeeder_cron.schedule, catfeeder_cron.job_runs TO PUBLIC;
