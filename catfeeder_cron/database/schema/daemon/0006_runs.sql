-- Runs of one daemon between slots that follow each other are one row: on a busy day there are thousands of them.
ALTER TABLE catfeeder_cron.job_runs ADD runs integer NOT NULL DEFAULT 1;

COMMENT ON COLUMN catfeeder_cron.oauth_tokens.sent_at IS
    'when the row had its turn last; with sent, how that ended is not known';
COMMENT ON COLUMN catfeeder_cron.oauth_tokens.refused IS
    'the hash that the provider called dead in this turn: not decided yet, or dismissed where refused_by is null';
COMMENT ON COLUMN catfeeder_cron.oauth_tokens.refused_by IS
    'which run is to decide, by the id of its lane';
