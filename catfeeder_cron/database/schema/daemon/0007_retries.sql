-- A run that failed is made again before the next slot: by any daemon, with the slot of the first.
ALTER TABLE catfeeder_cron.schedule
    ADD retry_slot timestamptz,  -- the slot of the run that failed; void once the account stands elsewhere
    ADD retry_at timestamptz;

ALTER TABLE catfeeder_cron.job_runs
    DROP CONSTRAINT job_runs_trigger_check,
    ADD CONSTRAINT job_runs_trigger_check CHECK (trigger IN ('schedule', 'manual', 'catch_up', 'retry'));

DROP INDEX catfeeder_cron.job_runs_slot;
CREATE UNIQUE INDEX job_runs_slot ON catfeeder_cron.job_runs (job, slot) WHERE NOT shared AND trigger <> 'retry';
CREATE INDEX job_runs_retries ON catfeeder_cron.job_runs (job, slot) WHERE trigger = 'retry';
