"""What an answer means, one class for each thing that is done about it. A `reason` is fit for a log.

Renewed     the token, and maybe the next refresh token, are to be stored
Partial     a refresh token and nothing else that is usable: it is stored all the same
Dead        the refresh token is worth nothing any more: its user has to log in again
Refused     the provider refuses us, not the user: it is left alone for a while, and no user blamed
Transient   it may work later
Ambiguous   nobody knows whether the provider has handed out a new refresh token
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Renewed:
    """`lifespan` and `refresh_lifespan` are seconds; None is what the provider does not say."""

    token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    lifespan: int | None
    refresh_lifespan: int | None = None


@dataclass(frozen=True)
class Partial:
    refresh_token: str = field(repr=False)
    reason: str


@dataclass(frozen=True)
class Dead:
    reason: str


@dataclass(frozen=True)
class Refused:
    """`authentication` is true after `401 invalid_client`, when the other method may do."""

    reason: str
    authentication: bool = False


@dataclass(frozen=True)
class Transient:
    """`retry_after` is in seconds. `unknown` is an error that nobody knows, which may be about one user alone."""

    reason: str
    throttled: bool = False
    retry_after: float | None = None
    unknown: bool = False


@dataclass(frozen=True)
class Ambiguous:
    reason: str


Answer = Renewed | Partial | Dead | Refused | Transient | Ambiguous
