-- Where answers are kept on disk: a row for every state folder that a daemon renews tokens with. After a failover or a restored
-- backup nothing is sent until each of them was looked through for answers that the database has lost.
CREATE TABLE catfeeder_cron.oauth_hosts (
    folder uuid PRIMARY KEY,   -- the id that is kept in the folder
    host text NOT NULL,
    renewed_at timestamptz,    -- when tokens were sent from there last
    lineage uuid,              -- the lineage.id of the history that it was looked through for; null while it is not finished
    looked_at timestamptz,     -- when that began
    put_back_at timestamptz    -- when an answer from there was put back into its row last
);

GRANT SELECT ON catfeeder_cron.oauth_hosts TO PUBLIC;
