"""OAuth links in a cluster and the strict server that knows which token of each is alive."""

from collections import Counter
from dataclasses import dataclass

import psycopg

from tests.integration.oauth.provider import Provider
from tests.proofs.outages.postgresql import Cluster
from tests.support.waiting import eventually

RENEWAL = "[jobs.renew-oauth]\ninterval = 2\n"
_LATER = "now() + interval '1 day'"


@dataclass
class Links:
    """Rows of "ActiveOauths", each of a user of the provider's own. None is due before `fall_due`."""

    provider: Provider
    number: int

    def insert(self, cluster: Cluster) -> None:
        with cluster.admin() as connection:
            connection.execute("INSERT INTO \"Services\" (name) VALUES ('acme')")
            connection.execute(
                'INSERT INTO "UserOauthConnection" (provider_name, client_id, client_secret, token_grabber_base_url)'
                " VALUES ('acme', 'client-id', 'client-secret', %s)",
                [self.provider.url],
            )
            with connection.cursor() as cursor:
                cursor.executemany(
                    'INSERT INTO "ActiveOauths"'
                    " (token, token_expiration, token_lifespan, refresh_link, service_id, user_id)"
                    f" SELECT 'old', {_LATER}, 3600, %s, id, 7 FROM \"Services\"".encode(),
                    [[self.provider.log_in(f"user{number}")] for number in range(self.number)],
                )

    def fall_due(self, cluster: Cluster) -> dict[int, str]:
        """Make all rows due; return the access token that each has until then."""
        with cluster.admin() as connection:
            before = dict(connection.execute('SELECT id, token FROM "ActiveOauths"').fetchall())
            connection.execute("UPDATE \"ActiveOauths\" SET token_expiration = now() + interval '1 min'")
        return before

    def renew_all(self, cluster: Cluster, seconds: float = 60) -> None:
        """Make all rows due and wait until each has another token."""
        before = self.fall_due(cluster)
        with cluster.admin() as connection:

            def old() -> int:
                rows = connection.execute('SELECT id, token FROM "ActiveOauths"').fetchall()
                return sum(before[id] == token for id, token in rows)

            try:
                eventually(lambda: old() == 0 or self.provider.reused, seconds=seconds)
            except AssertionError:
                raise AssertionError(f"{old()} of {self.number} links not renewed after {seconds:g} s") from None
        self.require_none_lost()

    def require_none_lost(self) -> None:
        """No token that was received is lost, and no link was revoked because one was sent twice."""
        lost = Counter(self.provider.reused)
        assert not lost, f"{len(lost)} of {self.number} links revoked, their refresh token sent twice: {dict(lost)}"
        assert len(self.provider.live) == self.number, f"{self.number - len(self.provider.live)} links revoked"

    def require_stored(self, cluster: Cluster, seconds: float = 60) -> None:
        """Every row holds, within so many seconds, the token that the provider takes next."""

        def missing() -> set[str]:
            with cluster.admin() as connection:
                return set(self.provider.live) - self._stored(connection)

        def none_is_missing() -> bool:
            self.require_none_lost()
            return not missing()

        try:
            eventually(none_is_missing, seconds=seconds)
        except AssertionError:
            self.require_none_lost()
            users = sorted(self.provider.live[token] for token in missing())
            raise AssertionError(
                f"received and not stored after {seconds:g} s: {len(users)} tokens of {users}"
            ) from None

    def _stored(self, connection: psycopg.Connection) -> set[str]:
        return {token for (token,) in connection.execute('SELECT refresh_link FROM "ActiveOauths"').fetchall()}
