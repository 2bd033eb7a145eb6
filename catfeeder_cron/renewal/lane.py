"""The requests of one provider in one run: a few at a time, and when to leave the provider alone."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from catfeeder_cron.errors import DatabaseUnavailable, JobInterrupted
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.answers import Ambiguous, Answer, Dead, Partial, Refused, Renewed, Transient
from catfeeder_cron.oauth.presets import ClientAuth
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.oauth.request import other_method
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.claims import Claim, Claimer
from catfeeder_cron.renewal.journal import Entry
from catfeeder_cron.renewal.outbox import Outbox, Settlement
from catfeeder_cron.renewal.providers import Pause, Standing
from catfeeder_cron.renewal.storing import Verdict

if TYPE_CHECKING:
    from catfeeder_cron.oauth.session import Session

log = get_logger(__name__)

_TROUBLES_IN_A_ROW = 3
# More than half of at least so many answers: then not the users are suspected.
_ANSWERS_TO_JUDGE_BY = 20
_ASK_AGAIN_SECONDS = (1.0, 2.0)


@dataclass(eq=False)
class Lane:
    outbox: Outbox
    session: "Session"
    provider: Provider
    standing: Standing
    claimer: Claimer
    id: UUID = field(default_factory=uuid4)
    counts: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    dead: int = 0
    suspect: bool = False
    halted: str | None = None
    """Why nothing more is sent to this provider in this run."""
    refused: bool = False
    given_back: bool = False
    """Rows were claimed and not sent."""
    _lifespan_missed: bool = False
    _failure: Exception | None = None
    _troubles: int = 0
    _auth: ClientAuth = "basic"

    async def renew(self) -> None:
        """Renew what is due, until that is all, the provider is left alone, or the run ends."""
        self._auth = self.provider.client_auth
        room: asyncio.Queue[Claim | None] = asyncio.Queue(maxsize=self.provider.concurrency)
        workers = [asyncio.create_task(self._work(room)) for _ in range(self.provider.concurrency)]
        try:
            await self._feed(room)
        finally:
            for _ in workers:
                await room.put(None)
            await asyncio.gather(*workers)
        if self._failure:
            raise self._failure
        if self._auth != self.provider.client_auth:
            await self.outbox.in_thread(providers.learn, self.outbox.context.database, self.provider, self._auth)
        if self.answers and self.standing.failures and not self.halted:
            await self.outbox.in_thread(providers.resume, self.outbox.context.database, self.provider)

    async def _feed(self, room: "asyncio.Queue[Claim | None]") -> None:
        while not self._is_over():
            try:
                claims = await self.outbox.in_thread(self.claimer.claim, self.outbox.context, self.provider.concurrency)
            except JobInterrupted:
                return
            except DatabaseUnavailable:
                await self.outbox.wait_for_database()
                continue
            if not claims:
                return
            for claim in claims:
                await room.put(claim)

    async def _work(self, room: "asyncio.Queue[Claim | None]") -> None:
        while (claim := await room.get()) is not None:
            try:
                await self._serve(claim)
            except Exception as error:  # noqa: BLE001 (raised by `renew`: until then somebody must empty the room)
                self._failure, self.halted = error, f"{type(error).__name__} while it was asked"

    async def _serve(self, claim: Claim) -> None:
        async with self.outbox.slots:
            asked = await self._ask(claim) if self._may_send(claim) else None
        if asked is None:
            self.given_back = True
            await self.outbox.put(Settlement(claim, self.counts))
        else:
            await self._take(claim, *asked)

    async def _ask(self, claim: Claim) -> tuple[float, Answer]:
        """Ask, by the other method too where that may help, and once more where nobody knows what happened."""
        used = self._auth
        asked_at, answer = await self._send(claim, used)
        if isinstance(answer, Refused) and answer.authentication and not self.provider.auth_is_configured:
            # A client that isn't let in spends no refresh token.
            another = self._auth if self._auth != used else other_method(used)
            asked_again_at, other_answer = await self._send(claim, another)
            if not isinstance(other_answer, Refused):
                asked_at, answer = asked_again_at, other_answer
            if isinstance(answer, Renewed | Partial | Dead):
                self._auth = another
        if isinstance(answer, Ambiguous):
            log.debug("oauth_asks_again", provider=self.provider.name, oauth_id=claim.id, reason=answer.reason)
            await asyncio.sleep(random.uniform(*_ASK_AGAIN_SECONDS))  # noqa: S311
            if self._may_send(claim):
                asked_at, answer = await self._send(claim, self._auth)
        return asked_at, answer

    async def _send(self, claim: Claim, client_auth: ClientAuth) -> tuple[float, Answer]:
        asked_at = time.time()
        return asked_at, await self.session.refresh(self.provider, claim.refresh_token, client_auth)

    async def _take(self, claim: Claim, asked_at: float, answer: Answer) -> None:
        self.answers += 1
        match answer:
            case Renewed():
                self._troubles = 0
                if answer.lifespan is None and not self._lifespan_missed:
                    self._lifespan_missed = True
                    log.info("oauth_lifespan_not_said", provider=self.provider.name)
                await self._keep(claim, self._entry(claim, asked_at, answer))
                return
            case Partial():
                self._tell(claim, answer.reason)
                await self._keep(claim, self._entry(claim, asked_at, answer))
                return
            case Dead():
                self._troubles = 0
                self.dead += 1
                if self.answers >= _ANSWERS_TO_JUDGE_BY and self.dead * 2 > self.answers:
                    self._suspect()
                verdict = Verdict(claim.id, claim.sent, self.id, dead=True)
            case Refused():
                verdict = Verdict(claim.id, claim.sent, self.id)
                await self._pause(providers.refused(answer.reason))
            case Transient(throttled=True):
                verdict = Verdict(claim.id, claim.sent, self.id)
                await self._pause(providers.throttled(answer.reason, answer.retry_after))
            case Transient() | Ambiguous():
                in_doubt = isinstance(answer, Ambiguous)
                verdict = Verdict(claim.id, claim.sent, self.id, failed=True, in_doubt=in_doubt)
                await self._trouble(answer)
        self._tell(claim, answer.reason)
        await self.outbox.put(Settlement(claim, self.counts, verdict=verdict))

    async def _keep(self, claim: Claim, entry: Entry) -> None:
        self.outbox.write_down(entry)
        await self.outbox.put(Settlement(claim, self.counts, entry=entry))

    def _entry(self, claim: Claim, asked_at: float, answer: Renewed | Partial) -> Entry:
        if isinstance(answer, Partial):
            return Entry(claim.id, claim.sent.hex(), asked_at, None, answer.refresh_token, None, False, None)
        usual = int(self.provider.access_lifetime.total_seconds())
        return Entry(
            id=claim.id,
            sent=claim.sent.hex(),
            asked_at=asked_at,
            token=answer.token,
            refresh_token=answer.refresh_token,
            lifespan=usual if answer.lifespan is None else answer.lifespan,
            lifespan_is_said=answer.lifespan is not None,
            refresh_lifespan=answer.refresh_lifespan,
        )

    async def _trouble(self, answer: Transient | Ambiguous) -> None:
        self._troubles += 1
        if isinstance(answer, Transient) and answer.retry_after is not None:
            await self._pause(providers.throttled(answer.reason, answer.retry_after))
        elif self._troubles >= _TROUBLES_IN_A_ROW:
            await self._pause(providers.out_of_order(answer.reason))

    async def _pause(self, pause: Pause) -> None:
        if self.halted:
            return
        self.halted, self.refused = pause.reason, pause.refused
        told_before = self.standing.failures and self.standing.reason == pause.reason
        try:
            seconds = await self.outbox.in_thread(providers.pause, self.outbox.context.database, self.provider, pause)
        except DatabaseUnavailable:
            return
        tell = log.info if told_before else log.error if pause.refused else log.warning
        tell("oauth_provider_paused", provider=self.provider.name, seconds=round(seconds), reason=pause.reason)

    def _suspect(self) -> None:
        if not self.suspect:
            self.suspect, self.halted = True, "it calls most tokens invalid"
            log.error(
                "oauth_provider_suspected",
                provider=self.provider.name,
                invalid=self.dead,
                answers=self.answers,
                reason="half of its users can't have lost their link at once, so nobody is asked to log in again",
            )

    def _may_send(self, claim: Claim) -> bool:
        """Not when the lease could end before the request does, as after a freeze of this process."""
        settings = self.outbox.settings
        return not self._is_over() and claim.good_for(settings.lease) > settings.request_timeout.total_seconds()

    def _is_over(self) -> bool:
        return self.halted is not None or self.outbox.is_ending()

    def _tell(self, claim: Claim, reason: str) -> None:
        log.debug("oauth_not_renewed", provider=self.provider.name, oauth_id=claim.id, reason=reason)
