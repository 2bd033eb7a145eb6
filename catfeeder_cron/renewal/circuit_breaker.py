"""When a run leaves a provider alone: for the rest of it, or for the short while that the provider asks for."""

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
# More than half of at least so many answers: then not the users are suspected.
_ANSWERS_TO_JUDGE_BY = 20
# What is claimed already is sent after a rest, so its lease must last.
_LONGEST_REST_SECONDS = 30.0
_SHORTEST_REST_SECONDS = 1.0
_LOOK_UP_SECONDS = 0.2


class CircuitBreaker:
    """One provider's in one run. Made and used inside one event loop."""

    def __init__(self, writer: BatchWriter, provider: Provider, state: ProviderState) -> None:
        self.answers = 0
        self.dead = 0
        self.is_suspect = False
        """The provider calls so many tokens dead that nobody is to be blamed for it."""
        self.halted: str | None = None
        """Why nothing more is sent to this provider in this run."""
        self.refused = False
        """Whether it is halted because the provider refuses us."""
        self.rests = 0
        self._served = 0
        self._writer = writer
        self._provider = provider
        self._standing = state
        self._troubles = 0
        self._fruitful = False
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def may_send(self) -> bool:
        return self.halted is None and self._awake.is_set()

    async def rested(self) -> None:
        """Wait while the provider is given a rest."""
        await self._awake.wait()

    def record(self, answer: Answer) -> ProviderPause | None:
        """Stop sending at once where the answer asks for it; return the pause that then is to be held, by `hold`."""
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
                # One that serves others may mean this token alone; one that does not know us means us.
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
        """Let every daemon keep the pause; return when it is over, if this run waits for that."""
        told_before = self._standing.reason == pause.reason or (self.halted is None and self.rests > 1)
        try:
            seconds = await self._writer.in_thread(
                providers.pause, self._writer.context.database, self._provider, pause
            )
            tell = log.info if told_before else log.error if pause.refused else log.warning
            tell("oauth_provider_paused", provider=self._provider.name, seconds=round(seconds), reason=pause.reason)
            if seconds > _LONGEST_REST_SECONDS + _SHORTEST_REST_SECONDS:  # by what another process was told
                self.halted = pause.reason
            until = elapsed_seconds() + max(seconds, _SHORTEST_REST_SECONDS)
            while self.halted is None and elapsed_seconds() < until and not self._writer.is_ending():
                await asyncio.sleep(_LOOK_UP_SECONDS)
        except DatabaseUnavailable:
            self.halted = pause.reason
        finally:
            self._awake.set()

    def give_up(self, reason: str) -> None:
        """Send nothing more, and let nobody wait."""
        self.halted = reason
        self._awake.set()

    def suspect(self, dead: int, answers: int) -> None:
        """Suspect the provider, not its users, where it calls more than half of the tokens dead."""
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
        """Forget the pauses before this run, and its rests, if the provider serves us again."""
        if self._served and (self._standing.reason or self.rests) and self.halted is None:
            await self._writer.in_thread(providers.resume, self._writer.context.database, self._provider)

    def _begin(self, pause: ProviderPause) -> ProviderPause | None:
        """Begin a rest if the provider asks for a short one, and has renewed something since the last; else halt."""
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
