"""A table like "Connections" of a busy Cat Feeder, built once for each size and copied for every round."""

from datetime import timedelta

# Expiries lie evenly up to this long before and after the moment of building, in random order over the table. So a
# run's `keep_expired_for` sets which share of the rows is to go, and one table serves every share.
_SPREAD = timedelta(days=100)

# Tokens as secrets.token_urlsafe() makes them.
_FILL = """
    INSERT INTO "Connections" (token, user_id, expiration_date)
    SELECT rtrim(translate(encode(sha256(n::text::bytea), 'base64'), '+/', '-_'), '='), n % 20000,
           now() + (2 * random() - 1) * %(spread)s::interval
    FROM generate_series(1, %(rows)s) n"""

_UNIQUE = 'ALTER TABLE "Connections" DROP CONSTRAINT "Connections_token_key"'
