"""Put together how a provider is asked: from its row in the database, its preset and the configuration."""

import ipaddress
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256

from catfeeder_cron.config.settings import ProviderSettings
from catfeeder_cron.config.values import split_http_url
from catfeeder_cron.oauth.presets import DEFAULT_CONCURRENCY, ClientAuth, preset


@dataclass(frozen=True)
class Provider:
    """How one provider is asked for tokens."""

    name: str
    url: str
    client_id: str
    client_secret: str = field(repr=False)
    client_auth: ClientAuth
    auth_is_configured: bool
    """The configuration names the method, so the other one is not tried."""
    concurrency: int
    access_lifetime: timedelta
    fault: str | None
    """Why it can't be asked, as a text for the operator."""

    @property
    def fingerprint(self) -> bytes:
        """A hash of the settings. It changes when the operator corrects them, and this ends a pause."""
        parts = (self.url, self.client_id, self.client_secret, self.client_auth if self.auth_is_configured else "")
        return sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()


def put_together(
    name: str, url: str | None, client_id: str | None, client_secret: str | None, settings: ProviderSettings
) -> Provider:
    """Return the provider. Raises nothing: a mistake in its settings becomes its `fault`."""
    known = preset(name)
    url = (url or "").strip()
    return Provider(
        name=name,
        url=url,
        client_id=client_id or "",
        client_secret=client_secret or "",
        client_auth=settings.client_auth or known.client_auth,
        auth_is_configured=settings.client_auth is not None,
        concurrency=settings.concurrency or DEFAULT_CONCURRENCY,
        access_lifetime=known.access_lifetime,
        fault=_fault_of_url(name, url, settings.allow_http) or (None if client_id else "its client_id is empty"),
    )


def _fault_of_url(name: str, url: str, allow_http: bool) -> str | None:
    """Return why the token endpoint can't be asked at this URL; RFC 6749, section 3.2, demands TLS."""
    if not url:
        return "its token_grabber_base_url is empty"
    parts = split_http_url(url)
    if parts is None:
        return "its token_grabber_base_url is no URL"
    if parts.username is not None or parts.password is not None:
        return "its token_grabber_base_url holds a user name or a password"
    if parts.scheme == "http" and not (allow_http or _is_loopback(parts.hostname or "")):
        return (
            "its token_grabber_base_url is plain http to another machine; make it https, or set "
            f"oauth.providers.{name}.allow_http = true"
        )
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
