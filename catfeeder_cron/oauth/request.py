"""Build a refresh request. No I/O."""

from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import quote_plus, urlencode, urlsplit, urlunsplit

from catfeeder_cron.oauth.presets import ClientAuth
from catfeeder_cron.oauth.provider import Provider


@dataclass(frozen=True)
class TokenRequest:
    """A POST request. Its headers and its content hold secrets."""

    url: str
    headers: dict[str, str] = field(repr=False)
    content: bytes = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    """The secrets in it, in each form in which they are sent; they must not be logged."""


def build(provider: Provider, refresh_token: str, client_auth: ClientAuth) -> TokenRequest:
    """Return the request that asks `provider` for a new access token.

    The client authenticates by one method (RFC 6749, section 2.3: never by two at once). It sends no scope, which keeps
    the scope of the original grant (section 6).
    """
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token}
    headers = {
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/x-www-form-urlencoded",
        "user-agent": "catfeeder-cron",
    }
    if client_auth == "basic":
        headers["authorization"] = _basic(provider.client_id, provider.client_secret)
    else:
        form["client_id"] = provider.client_id
        if provider.client_secret:
            form["client_secret"] = provider.client_secret
    plain = (refresh_token, provider.client_secret)
    secrets = (*plain, *map(quote_plus, plain), headers.get("authorization", "").removeprefix("Basic "))
    return TokenRequest(_without_fragment(provider.url), headers, urlencode(form).encode(), secrets)


def other_method(client_auth: ClientAuth) -> ClientAuth:
    """Return the method of authentication that this one is not."""
    return "body" if client_auth == "basic" else "basic"


def _basic(client_id: str, client_secret: str) -> str:
    """Return the header's value. Both are form-encoded first (RFC 6749, section 2.3.1), because they may hold a `:`."""
    return "Basic " + b64encode(f"{quote_plus(client_id)}:{quote_plus(client_secret)}".encode()).decode()


def _without_fragment(url: str) -> str:
    return urlunsplit(urlsplit(url)._replace(fragment=""))
