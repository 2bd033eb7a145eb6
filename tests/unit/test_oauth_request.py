"""What is sent to a provider, and which providers can be asked at all."""

from base64 import b64decode
from datetime import timedelta
from urllib.parse import parse_qs, unquote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catfeeder_cron.config import ProviderSettings
from catfeeder_cron.oauth.presets import PRESETS, preset
from catfeeder_cron.oauth.provider import Provider, put_together
from catfeeder_cron.oauth.request import build

URL = "https://auth.example.org/token?tenant=1#top"


def provider(
    name: str = "acme",
    url: str | None = URL,
    client_id: str | None = "cats",
    client_secret: str | None = "s3cret",
    settings: ProviderSettings = ProviderSettings(),  # noqa: B008 (frozen)
) -> Provider:
    return put_together(name, url, client_id, client_secret, settings)


def form(content: bytes) -> dict[str, str]:
    return {key: value for key, [value] in parse_qs(content.decode(), strict_parsing=True).items()}


SECRETS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(client_id=SECRETS, client_secret=SECRETS)
def test_basic_form_encodes_id_and_secret_before_it_joins_them(client_id: str, client_secret: str) -> None:
    request = build(provider(client_id=client_id, client_secret=client_secret), "r", "basic")
    scheme, _, credentials = request.headers["authorization"].partition(" ")
    left, right = b64decode(credentials).decode("ascii").split(":")
    assert (scheme, unquote_plus(left), unquote_plus(right)) == ("Basic", client_id, client_secret)
    assert form(request.content) == {"grant_type": "refresh_token", "refresh_token": "r"}


def test_basic_is_encoded_as_the_rfc_says() -> None:
    request = build(provider(client_id="c:d", client_secret="50% + a"), "r", "basic")
    assert b64decode(request.headers["authorization"].removeprefix("Basic ")) == b"c%3Ad:50%25+%2B+a"


@given(token=SECRETS, client_secret=SECRETS)
def test_the_body_holds_the_credentials_by_the_other_method_and_never_a_scope(token: str, client_secret: str) -> None:
    request = build(provider(client_secret=client_secret), token, "body")
    assert "authorization" not in request.headers
    assert form(request.content) == {
        "grant_type": "refresh_token",
        "refresh_token": token,
        "client_id": "cats",
        "client_secret": client_secret,
    }


def test_a_public_client_names_itself_alone() -> None:
    assert "client_secret" not in form(build(provider(client_secret=None), "r", "body").content)


def test_json_is_asked_for_unpacked_at_the_url_without_its_fragment() -> None:
    request = build(provider(), "r", "body")
    assert request.url == "https://auth.example.org/token?tenant=1"
    assert request.headers["accept"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"


def test_neither_a_provider_nor_a_request_shows_a_secret() -> None:
    shown = repr(provider()) + repr(build(provider(), "refresh-me", "body")) + repr(build(provider(), "r", "basic"))
    assert "s3cret" not in shown
    assert "refresh-me" not in shown
    assert "Basic" not in shown


@pytest.mark.parametrize(
    ("name", "auth"),
    [("google", "body"), ("Spotify", "basic"), ("GITHUB", "body"), ("reddit", "basic"), ("unheard-of", "basic")],
)
def test_a_preset_goes_by_the_name_in_any_case_and_the_configuration_goes_before_it(name: str, auth: str) -> None:
    assert provider(name).client_auth == auth
    other = ProviderSettings(client_auth="body" if auth == "basic" else "basic", concurrency=3)
    changed = provider(name, settings=other)
    assert (changed.client_auth, changed.auth_is_configured, changed.concurrency) == (other.client_auth, True, 3)


def test_every_provider_of_the_table_has_a_preset() -> None:
    wanted = {"google", "discord", "spotify", "github", "microsoft", "twitch", "reddit", "strava"}
    assert PRESETS.keys() == wanted
    assert preset("Spotify").refresh_lifetime == timedelta(days=180)
    assert not preset("Spotify").renewal_extends
    assert provider("acme").concurrency == 8


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://auth.example.org/token",
            "http://127.0.0.1:8000/o/token/",
            "http://[::1]:8000/",
            "http://localhost/t",
        ),
        *("http://127.8.9.1/", " https://auth.example.org/token "),
    ],
)
def test_tls_or_loopback_will_do(url: str) -> None:
    assert provider(url=url).fault is None


@pytest.mark.parametrize("url", ["http://auth.example.org/token", "http://10.0.0.1/", "http://localhost.example.org/"])
def test_plain_http_to_another_machine_must_be_allowed_by_name(url: str) -> None:
    fault = provider(url=url).fault
    assert fault
    assert "oauth.providers.acme.allow_http" in fault
    assert provider(url=url, settings=ProviderSettings(allow_http=True)).fault is None


@pytest.mark.parametrize(
    "url",
    ["", None, "auth.example.org/token", "ftp://h/", "https://", "https://h:99999/", "https://[::1/", "https://a b/",
     "https://user:pw@h/", "https://h/\nX: y"],
)  # fmt: skip
def test_what_is_no_url_is_a_fault_that_does_not_quote_it(url: str | None) -> None:
    fault = provider(url=url).fault
    assert fault
    assert "token_grabber_base_url" in fault
    assert "pw" not in fault


def test_a_missing_client_id_is_a_fault_and_a_missing_secret_is_none() -> None:
    assert provider(client_id=None).fault
    assert provider(client_secret=None).fault is None


def test_a_fingerprint_changes_with_whatever_is_corrected() -> None:
    given = [
        provider(),
        provider(url="https://other.example.org/"),
        provider(client_id="dogs"),
        provider(client_secret="other"),
        provider(settings=ProviderSettings(client_auth="body")),
    ]
    assert len({each.fingerprint for each in given}) == len(given)
    assert provider().fingerprint == provider(settings=ProviderSettings(concurrency=5)).fingerprint
