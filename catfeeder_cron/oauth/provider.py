"""One provider as it is to be asked: its row in the database, its preset and the configuration put together."""

import ipaddress
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from urllib.parse import urlsplit

from catfeeder_cron.config import ProviderSettings
from catfeeder_cron.oauth.presets import DEFAULT_CONCURRENCY, ClientAuth, preset


@dataclass(frozen=True)
class Provider:
    name: str
    url: str
    client_id: str
    client_secret: str = field(repr=False)
    client_auth: ClientAuth
    auth_is_configured: bool
    """The configuration names the method, so no other is tried."""
    concurrency: int
    access_lifetime: timedelta
    fault: str | None
    """Why it can't be asked, in words for the operator."""

    @property
    def fingerprint(self) -> bytes:
        """What changes when somebody corrects how the provider is asked: a pause for that reason ends then."""
        told = (self.url, self.client_id, self.client_secret, self.client_auth if self.auth_is_configured else "")
        return sha256("\0".join(told).encode("utf-8", "surrogatepass")).digest()


def put_together(
    name: str, url: str | None, client_id: str | None, client_secret: str | None, settings: ProviderSettings
) -> Provider:
    """Return the provider; what keeps it from being asked is its `fault`, never an exception."""
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
    """RFC 6749, section 3.2: the token endpoint is asked over TLS."""
    if not url:
        return "its token_grabber_base_url is empty"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "its token_grabber_base_url is no URL"
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url or "\\" in url:
        return "its token_grabber_base_url is no URL"
    if parts.username is not None or parts.password is not None:
        return "its token_grabber_base_url holds a user name or a password"
    if parts.scheme == "http" and not (allow_http or _is_loopback(host)):
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
