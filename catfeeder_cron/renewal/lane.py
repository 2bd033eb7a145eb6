"""The requests of one provider in one run, a few at a time, and what is to be stored of their answers."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
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
from catfeeder_cron.renewal.patience import Patience
from catfeeder_cron.renewal.storing import Verdict

if TYPE_CHECKING:
    from catfeeder_cron.oauth.session import Session

log = get_logger(__name__)

_ASK_AGAIN_SECONDS = (1.0, 2.0)


@dataclass(eq=False)
class Lane:
    outbox: Outbox
    session: "Session"
    provider: Provider
    patience: Patience
    claimer: Claimer
    id: UUID = field(default_factory=uuid4)
    counts: Counter[str] = field(default_factory=Counter)
    _lifespan_missed: bool = False
    _failure: Exception | None = None
    _auth: ClientAuth = "basic"
    _told: bool = False

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
        await self.patience.end()

    async def _feed(self, room: "asyncio.Queue[Claim | None]") -> None:
        while not self._is_over():
            await self.patience.rested()
            rests, claimer = self.patience.rests, replace(self.claimer)
            try:
                claims = await self.outbox.in_thread(self.claimer.claim, self.outbox.context, self.provider.concurrency)
            except JobInterrupted:
                return
            except DatabaseUnavailable:
                await self.outbox.wait_for_database()
                continue
            if not claims and rests == self.patience.rests:
                return
            if not claims:
                self.claimer = claimer  # it took the rest that has begun for the end of the rows
            for claim in claims:
                await room.put(claim)

    async def _work(self, room: "asyncio.Queue[Claim | None]") -> None:
        while (claim := await room.get()) is not None:
            try:
                await self._serve(claim)
            except Exception as error:  # noqa: BLE001 (raised by `renew`: until then somebody must empty the room)
                self._failure, self.patience.halted = error, f"{type(error).__name__} while it was asked"

    async def _serve(self, claim: Claim) -> None:
        await self.patience.rested()
        async with self.outbox.slots:
            asked = await self._ask(claim) if self._may_send(claim) else None
        if asked is None:
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
        pause = self.patience.heed(answer)
        if isinstance(answer, Renewed | Partial):
            entry = self._entry(claim, asked_at, answer)
            self.outbox.write_down(entry)
            settlement = Settlement(claim, self.counts, entry=entry)
        else:
            settlement = Settlement(claim, self.counts, verdict=self._verdict(claim, answer))
        if not isinstance(answer, Renewed):
            self._tell(claim, answer.reason)
        await self.outbox.put(settlement)
        if pause:
            await self.patience.keep(pause)

    def _verdict(self, claim: Claim, answer: Dead | Refused | Transient | Ambiguous) -> Verdict:
        match answer:
            case Dead():
                return Verdict(claim.id, claim.sent, self.id, dead=True)
            case Refused() | Transient(throttled=True):
                return Verdict(claim.id, claim.sent, self.id)
            case Transient() | Ambiguous():
                in_doubt = isinstance(answer, Ambiguous)
                return Verdict(claim.id, claim.sent, self.id, failed=True, in_doubt=in_doubt)

    def _entry(self, claim: Claim, asked_at: float, answer: Renewed | Partial) -> Entry:
        if isinstance(answer, Partial):
            return Entry(claim.id, claim.sent.hex(), asked_at, None, answer.refresh_token, None, False, None)
        if answer.lifespan is None and not self._lifespan_missed:
            self._lifespan_missed = True
            log.info("oauth_lifespan_not_said", provider=self.provider.name)
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

    def _may_send(self, claim: Claim) -> bool:
        """Not when the lease could end before the request does, as after a freeze of this process."""
        settings = self.outbox.settings
        if self._is_over() or not self.patience.may_send:
            return False
        return claim.good_for(settings.lease) > settings.request_timeout.total_seconds()

    def _is_over(self) -> bool:
        return self.patience.halted is not None or self.outbox.is_ending()

    def _tell(self, claim: Claim, reason: str) -> None:
        # The first of a provider stands for all of a run: what goes wrong for one goes wrong for many.
        level = log.debug if self._told else log.warning
        self._told = True
        level("oauth_not_renewed", provider=self.provider.name, oauth_id=claim.id, reason=reason)
