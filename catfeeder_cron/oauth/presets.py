"""What is known of well-known providers: from their documentation, and what they were seen to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Literal

ClientAuth = Literal["basic", "body"]

DEFAULT_CONCURRENCY = 8
_MONTHS_6 = timedelta(days=180)


@dataclass(frozen=True)
class Preset:
    """The defaults are those of a provider that RFC 6749 alone describes (Basic is what it makes servers support)."""

    client_auth: ClientAuth = "basic"
    access_lifetime: timedelta = timedelta(hours=1)
    """Of an access token whose answer does not say."""
    refresh_lifetime: timedelta | None = None
    """Until a refresh token ends; None where nobody knows."""
    renewal_extends: bool = True
    """Whether that time begins anew with every renewal; else it counts from the user's consent."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "google": Preset("body", timedelta(hours=1), _MONTHS_6),
        "discord": Preset("body", timedelta(days=7)),
        "spotify": Preset("basic", timedelta(hours=1), _MONTHS_6, renewal_extends=False),
        "github": Preset("body", timedelta(hours=8), _MONTHS_6),
        "microsoft": Preset("body", timedelta(hours=1), timedelta(days=90)),
        "twitch": Preset("body", timedelta(hours=4)),
        "reddit": Preset("basic", timedelta(hours=1)),
        "strava": Preset("body", timedelta(hours=6)),
    }
)
"""By the provider's name in lower case."""


def preset(name: str) -> Preset:
    return PRESETS.get(name.lower(), Preset())
