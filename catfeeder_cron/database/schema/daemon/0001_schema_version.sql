-- The daemon keeps its own state in this schema and nowhere else. An administrator may have created it for a role that
-- may not: to such a one even CREATE SCHEMA IF NOT EXISTS is forbidden.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'catfeeder_cron') THEN
        CREATE SCHEMA catfeeder_cron;
    END IF;
END $$;

GRANT USAGE ON SCHEMA catfeeder_cron TO PUBLIC;

-- A row for every numbered file that was applied. Version N serves programs that know N or N - 1.
CREATE TABLE catfeeder_cron.schema_version (
    version integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

GRANT SELECT ON catfeeder_cron.schema_version TO PUBLIC;
