"""Decide when a run stops sending to a provider: for good, or for the short time that the provider asks for."""

import asyncio

from catfeeder_cron.errors import DatabaseUnavailable
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.answers import Ambiguous, Answer, Dead, Partial, Refused, Renewed, Transient
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.batch_writer import BatchWriter
from catfeeder_cron.renewal.providers import ProviderPause, ProviderState
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.oauth")

_TROUBLES_IN_A_ROW = 3
# When more than half of at least so many answers call a token dead, the provider is suspected, not its users.
_ANSWERS_TO_JUDGE_BY = 20
# Rows that are claimed already are sent after a rest, so their leases must outlast it.
_LONGEST_REST_SECONDS = 30.0
_SHORTEST_REST_SECONDS = 1.0
_LOOK_UP_SECONDS = 0.2


class CircuitBreaker:
    """Watches the answers of one provider in one run. Made and used inside one event loop, so it needs no lock."""

    def __init__(self, writer: BatchWriter, provider: Provider, state: ProviderState) -> None:
        self.answers = 0
        self.dead = 0
        self.is_suspect = False
        """The provider calls so many tokens dead that no user is asked to log in again."""
        self.halted: str | None = None
        """Why nothing more is sent to this provider in this run."""
        self.refused = False
        """Whether it is halted because the provider refuses us."""
        self.rests = 0
        self._served = 0
        self._writer = writer
        self._provider = provider
        self._state = state
        self._troubles = 0
        self._fruitful = False
        # Cleared while the provider rests; requesters wait for it before they send.
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def may_send(self) -> bool:
        """Whether a request may be sent now: the provider is neither halted nor resting."""
        return self.halted is None and self._awake.is_set()

    async def rested(self) -> None:
        """Wait until the provider's rest is over."""
        await self._awake.wait()

    def record(self, answer: Answer) -> ProviderPause | None:
        """Count the answer, and stop sending where it asks for that; return the pause that `hold` must then keep."""
        self.answers += 1
        match answer:
            case Renewed() | Partial():
                self._troubles, self._fruitful = 0, True
                self._served += 1
            case Dead():
                self._troubles = 0
                self._served += 1
                self.dead += 1
                self.suspect(self.dead, self.answers)
            case Refused(reason, authentication):
                self._troubles += 1
                # A provider that serves other rows may refuse this token alone; a failed authentication concerns all.
                if not self._served or authentication or self._troubles >= _TROUBLES_IN_A_ROW:
                    return self._begin(providers.refused(reason))
            case Transient(reason, throttled=True) as throttled:
                return self._begin(providers.throttled(reason, throttled.retry_after))
            case Transient(reason, retry_after=float(seconds)):
                return self._begin(providers.throttled(reason, seconds))
            case Transient(unknown=True):
                pass
            case Transient(reason) | Ambiguous(reason):
                self._troubles += 1
                if self._troubles >= _TROUBLES_IN_A_ROW:
                    return self._begin(providers.out_of_order(reason))
        return None

    async def hold(self, pause: ProviderPause) -> None:
        """Store the pause for every daemon; when this run waits for its end, return after it."""
        logged_before = self._state.reason == pause.reason or (self.halted is None and self.rests > 1)
        try:
            seconds = await self._writer.in_thread(
                providers.pause, self._writer.context.database, self._provider, pause
            )
            write = log.info if logged_before else log.error if pause.refused else log.warning
            write("oauth_provider_paused", provider=self._provider.name, seconds=round(seconds), reason=pause.reason)
            if seconds > _LONGEST_REST_SECONDS + _SHORTEST_REST_SECONDS:  # another process stored a longer pause
                self.halted = pause.reason
            until = elapsed_seconds() + max(seconds, _SHORTEST_REST_SECONDS)
            while self.halted is None and elapsed_seconds() < until and not self._writer.is_ending():
                await asyncio.sleep(_LOOK_UP_SECONDS)
        except DatabaseUnavailable:
            self.halted = pause.reason
        finally:
            self._awake.set()

    def give_up(self, reason: str) -> None:
        """Send nothing more in this run, and wake the requesters that wait for the end of a rest."""
        self.halted = reason
        self._awake.set()

    def suspect(self, dead: int, answers: int) -> None:
        """Suspect the provider, not its users, when it calls more than half of the tokens dead."""
        if answers >= _ANSWERS_TO_JUDGE_BY and dead * 2 > answers and not self.is_suspect:
            self.is_suspect, self.halted = True, "it calls most tokens invalid"
            log.error(
                "oauth_provider_suspected",
                provider=self._provider.name,
                invalid=dead,
                answers=answers,
                reason="half of its users can't have lost their link at once, so nobody is asked to log in again",
            )

    async def end(self) -> None:
        """Delete the provider's stored pause if the provider has served this run."""
        if self._served and (self._state.reason or self.rests) and self.halted is None:
            await self._writer.in_thread(providers.resume, self._writer.context.database, self._provider)

    def _begin(self, pause: ProviderPause) -> ProviderPause | None:
        """Begin a rest if the provider asks for a short one and has renewed a token since the last rest; else halt."""
        if self.halted:
            return None
        is_short = pause.given is not None and pause.given <= _LONGEST_REST_SECONDS
        if is_short and not self._awake.is_set():
            return None  # it rests already
        if is_short and self._fruitful:
            self._awake.clear()
            self.rests, self._fruitful = self.rests + 1, False
        else:
            self.halted, self.refused = pause.reason, pause.refused
        return pause
