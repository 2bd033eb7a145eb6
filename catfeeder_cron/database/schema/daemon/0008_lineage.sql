-- Which history of this database the daemons work on. A server may lose its last seconds (a standby that lagged is promoted,
-- a backup is restored): rows are as they were before, and numbers that were given out are given out again.

-- The server that one is connected to, its timeline, and the copy of the table below: a restored dump has another one. What
-- a managed server does not tell stays empty.
CREATE FUNCTION catfeeder_cron.server() RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    system text := '';
    timeline text := '';
BEGIN
    BEGIN
        system := (SELECT system_identifier FROM pg_control_system());
    EXCEPTION WHEN insufficient_privilege OR feature_not_supported OR undefined_function THEN
    END;
    BEGIN
        timeline := left(pg_walfile_name(pg_current_wal_insert_lsn()), 8);
    EXCEPTION WHEN insufficient_privilege OR feature_not_supported OR undefined_function
                OR object_not_in_prerequisite_state THEN
    END;
    RETURN system || '/' || timeline || '/' || 'catfeeder_cron.lineage'::regclass::oid;
END $$;

-- One row, which every heartbeat changes.
CREATE TABLE catfeeder_cron.lineage (
    id uuid NOT NULL DEFAULT gen_random_uuid(),     -- a new one whenever history went back, or may have
    since timestamptz NOT NULL DEFAULT now(),
    reason text,                                    -- why it has a new id
    known_until timestamptz,                        -- the last heartbeat that the database knew of when it got that
    server text NOT NULL,                           -- server() at the last heartbeat
    counter bigint NOT NULL DEFAULT 0,              -- heartbeats of all processes; it only grows
    written_at timestamptz NOT NULL DEFAULT now(),  -- the last heartbeat
    heard_since timestamptz NOT NULL DEFAULT now()  -- since then the heartbeats came without a break
) WITH (fillfactor = 50);

INSERT INTO catfeeder_cron.lineage (server) VALUES (catfeeder_cron.server());

-- Each process knows how many it has sent: a smaller number here tells it that some were lost.
ALTER TABLE catfeeder_cron.daemons ADD beats bigint NOT NULL DEFAULT 0;

GRANT SELECT ON catfeeder_cron.lineage TO PUBLIC;
