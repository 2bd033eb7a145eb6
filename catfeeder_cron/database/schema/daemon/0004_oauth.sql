-- What is known of a row of "ActiveOauths" beyond the row itself. No token is in here: `sent`, `refused`, `dead` and `held`
-- are SHA-256 hashes of refresh tokens.
CREATE TABLE catfeeder_cron.oauth_tokens (
    oauth_id bigint PRIMARY KEY,            -- "ActiveOauths".id
    owner uuid,                             -- the run that has the row, and until when it is out of reach of others
    lease_until timestamptz,
    sent bytea,                             -- sent to the provider, and not known how that ended
    sent_at timestamptz,
    failures integer NOT NULL DEFAULT 0,    -- in a row
    not_before timestamptz,                 -- back-off
    refused bytea,                          -- called dead by the provider; the run makes up its mind at its end
    refused_by uuid,
    dead bytea,                             -- worth nothing any more: the row is left alone until it holds another one
    dead_since timestamptz,
    held bytea,                             -- stored by us last
    consented_at timestamptz,               -- the first that is known of the chain of tokens that `held` belongs to
    refresh_expires_at timestamptz          -- of `held`, as the provider said
);

CREATE INDEX oauth_tokens_owner ON catfeeder_cron.oauth_tokens (owner) WHERE owner IS NOT NULL;
CREATE INDEX oauth_tokens_refused_by ON catfeeder_cron.oauth_tokens (refused_by) WHERE refused_by IS NOT NULL;

-- Providers that are left alone for a while, and what was learned of them.
CREATE TABLE catfeeder_cron.oauth_providers (
    provider text PRIMARY KEY,              -- "UserOauthConnection".provider_name
    fingerprint bytea NOT NULL,             -- of how it was asked: what follows is void when that changes
    paused_until timestamptz,
    refused boolean NOT NULL DEFAULT false, -- it refused us, rather than being out of order
    reason text,
    failures integer NOT NULL DEFAULT 0,    -- pauses in a row
    client_auth text                        -- the method that works, where it is not the expected one
);

-- Which database this is: journals of answers on a daemon's disk name it, and are never replayed into another.
CREATE TABLE catfeeder_cron.oauth_identity (
    id uuid NOT NULL DEFAULT gen_random_uuid()
);

INSERT INTO catfeeder_cron.oauth_identity DEFAULT VALUES;
