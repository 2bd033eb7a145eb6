-- Jobs that no daemon starts. '*' stands for all of them. No `until`: as long as the row is there.
CREATE TABLE catfeeder_cron.pauses (
    job text PRIMARY KEY,
    until timestamptz,
    because text,
    paused_at timestamptz NOT NULL DEFAULT now(),
    host text NOT NULL
);

GRANT SELECT ON catfeeder_cron.pauses TO PUBLIC;
