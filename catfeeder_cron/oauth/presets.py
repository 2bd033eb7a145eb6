"""Defaults for well-known providers, from their documentation and from observation."""

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
    """A provider's defaults. Without arguments, those of RFC 6749, by which every server must support Basic."""

    client_auth: ClientAuth = "basic"
    access_lifetime: timedelta = timedelta(hours=1)
    """The lifetime of an access token if the answer does not give one."""
    refresh_lifetime: timedelta | None = None
    """The lifetime of a refresh token; None if it is unknown."""
    renewal_extends: bool = True
    """Whether that lifetime begins again with every renewal; else it counts from the user's consent."""


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
"""The presets, by the provider's name in lower case."""


def preset(name: str) -> Preset:
    """Return the preset of a provider; its name may be in any case."""
    return PRESETS.get(name.lower(), Preset())
