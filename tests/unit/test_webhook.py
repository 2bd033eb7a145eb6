"""Which URLs and addresses a webhook may reach, and what an answer means."""

import ipaddress

import pytest

from catfeeder_cron.actions.webhook.allowed import AllowList
from catfeeder_cron.actions.webhook.connection import is_public
from catfeeder_cron.errors import HopelessAction

ALLOWED = AllowList(["https://hooks.example.org/cats/", "http://127.0.0.1:8080/one", "https://münchen.example"])


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.org/cats/",
        "https://hooks.example.org/cats/tom?meal=1#x",
        "https://hooks.example.org:443/cats/tom",
        "HTTPS://HOOKS.EXAMPLE.ORG/cats/tom",
        "http://127.0.0.1:8080/one",
        "http://127.0.0.1:8080/one/two",
        "https://hooks.example.org/cats/a..b/.well-known",
        "https://hooks.example.org/cats/?next=/../x",
        "https://xn--mnchen-3ya.example/anything",
    ],
)
def test_what_is_below_a_listed_prefix_is_allowed(url: str) -> None:
    ALLOWED.require(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/cats/",
        "https://hooks.example.org:8443/cats/",
        "https://hooks.example.org/cats",
        "https://hooks.example.org/catsitters/",
        "https://hooks.example.org/",
        "https://hooks.example.org.evil.example/cats/",
        "https://evil.example/https://hooks.example.org/cats/",
        "https://hooks.example.org@evil.example/cats/",
        "https://user:secret@hooks.example.org/cats/",
        "https://@hooks.example.org/cats/",
        "https://evil.example#@hooks.example.org/cats/",
        "https://evil.example\\@hooks.example.org/cats/",
        "https://hooks.example.org/cats/../admin",
        "https://hooks.example.org/cats/%2e%2E/admin",
        "https://hooks.example.org/cats/.%2e/admin",
        "https://hooks.example.org/cats/..%2fadmin",
        "https://hooks.example.org/cats/..;/admin",
        "https://hooks.example.org/cats\\..\\admin",
        "https://hooks.example.org/cats/./x",
        "http://127.0.0.1:8080/onetwo",
        "http://127.1:8080/one",
        "http://2130706433:8080/one",
        "http://[::ffff:127.0.0.1]:8080/one",
        "//hooks.example.org/cats/",
        "file:///etc/passwd",
        "https://hooks.example.org/cats/\r\nHost: evil",
        "",
        "https://",
        None,
        7,
    ],
)
def test_nothing_else_is(url: object) -> None:
    with pytest.raises(HopelessAction):
        ALLOWED.require(url)


def test_a_refusal_does_not_quote_the_url() -> None:
    with pytest.raises(HopelessAction) as refusal:
        ALLOWED.require("https://user:hunter2@elsewhere.example/secret")

    assert "hunter2" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("::7f00:1", False),
    ],
)
def test_only_public_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public
