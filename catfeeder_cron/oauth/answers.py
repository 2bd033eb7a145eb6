"""The kinds of answers, one class for each decision of a caller. A `reason` may be logged: it holds no secret.

Renewed     store the token, and the next refresh token if there is one
Partial     store the refresh token; the rest of the answer is not usable
Dead        the refresh token is not valid any more: ask its user to log in again
Refused     the provider refuses this client, not the user: pause the provider, and ask no user to log in
Transient   try again later
Ambiguous   it is unknown whether the provider has handed out a new refresh token
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Renewed:
    """The provider sent a token. `lifespan` and `refresh_lifespan` are in seconds, None if the provider gave none."""

    token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    lifespan: int | None
    refresh_lifespan: int | None = None


@dataclass(frozen=True)
class Partial:
    """The provider sent a refresh token without a usable access token."""

    refresh_token: str = field(repr=False)
    reason: str


@dataclass(frozen=True)
class Dead:
    """The provider called the refresh token invalid."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The provider refused this client. `authentication`: after `401 invalid_client`, the other method may work."""

    reason: str
    authentication: bool = False


@dataclass(frozen=True)
class Transient:
    """The request failed for now.

    `retry_after` is in seconds. `unknown`: the error is in no list of ours, so it may concern this user only.
    """

    reason: str
    throttled: bool = False
    retry_after: float | None = None
    unknown: bool = False


@dataclass(frozen=True)
class Ambiguous:
    """The connection broke, or the answer can't be read, after the provider may have acted."""

    reason: str


Answer = Renewed | Partial | Dead | Refused | Transient | Ambiguous
