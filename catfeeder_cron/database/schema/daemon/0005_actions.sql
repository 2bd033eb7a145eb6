-- What the rows of "Actions" need beside their own columns.

-- A row that repeats and is to be tried again: the slot that it was due at, since its due_at is when to try again.
CREATE TABLE catfeeder_cron.action_retries (
    action text PRIMARY KEY,
    due_at timestamptz NOT NULL,
    retry_at timestamptz NOT NULL  -- the due_at that the row has meanwhile; with another one, somebody else has set it
);

-- Goes into every idempotency key: ids come again in other databases.
CREATE TABLE catfeeder_cron.action_origin (origin uuid NOT NULL);
INSERT INTO catfeeder_cron.action_origin VALUES (gen_random_uuid());

-- The daemons listen on this channel. `init-db --with-app-tables` puts the trigger on the table.
CREATE FUNCTION catfeeder_cron.actions_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('catfeeder_cron_actions', '');
    RETURN NULL;
END $$;

GRANT SELECT ON catfeeder_cron.action_retries, catfeeder_cron.action_origin TO PUBLIC;
