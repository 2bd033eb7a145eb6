"""The requests of one provider in one run, a few at a time, and what is to be stored of their answers."""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from catfeeder_cron.errors import DatabaseUnavailable, JobInterrupted, LockTimeout
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.answers import Ambiguous, Answer, Dead, Partial, Refused, Renewed, Transient
from catfeeder_cron.oauth.presets import ClientAuth
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.oauth.request import other_method
from catfeeder_cron.renewal import providers
from catfeeder_cron.renewal.batch_writer import BatchWriter, Settlement
from catfeeder_cron.renewal.circuit_breaker import CircuitBreaker
from catfeeder_cron.renewal.claims import Claimer, TokenClaim
from catfeeder_cron.renewal.failures import Failure
from catfeeder_cron.renewal.journal import Entry

if TYPE_CHECKING:
    from catfeeder_cron.oauth.session import Session

log = get_logger("catfeeder_cron.oauth")

_ASK_AGAIN_SECONDS = (1.0, 2.0)


@dataclass(frozen=True)
class Asked:
    """What came of asking. `in_doubt`: the provider may have acted without our knowing how."""

    at: float
    answer: Answer
    in_doubt: bool


@dataclass(eq=False)
class ProviderWorker:
    writer: BatchWriter
    session: "Session"
    provider: Provider
    breaker: CircuitBreaker
    claimer: Claimer
    id: UUID = field(default_factory=uuid4)
    counts: Counter[str] = field(default_factory=Counter)
    _lifespan_missed: bool = False
    _failure: Exception | None = None
    trouble: str | None = None
    """The first reason for which a row was not renewed."""

    def __post_init__(self) -> None:
        self._auth: ClientAuth = self.provider.client_auth
        self._other_method = asyncio.Lock()
        self._neither_method = False

    async def renew(self) -> None:
        """Renew what is due, until that is all, the provider is left alone, or the run ends.

        A second call takes what the first could not have: rows that somebody had locked, or that were given back.
        """
        self.claimer.begin_again()
        queue: asyncio.Queue[TokenClaim | None] = asyncio.Queue(maxsize=self.provider.concurrency)
        requesters = [asyncio.create_task(self._work(queue)) for _ in range(self.provider.concurrency)]
        try:
            await self._feed(queue)
        finally:
            for _ in requesters:
                await queue.put(None)
            await asyncio.gather(*requesters)
        if self._failure:
            raise self._failure
        with suppress(DatabaseUnavailable):  # what is not remembered is found out again
            if self._auth != self.provider.client_auth:
                await self.writer.in_thread(providers.learn, self.writer.context.database, self.provider, self._auth)
            await self.breaker.end()

    async def _feed(self, queue: "asyncio.Queue[TokenClaim | None]") -> None:
        while not self._is_over():
            await self.breaker.rested()
            rests = self.breaker.rests
            try:
                claims = await self.writer.in_thread(self.claimer.claim, self.writer.context, self.provider.concurrency)
            except JobInterrupted:
                return
            except (DatabaseUnavailable, LockTimeout):
                await self.writer.wait_for_database()
                continue
            if not claims and rests == self.breaker.rests:
                return
            if not claims:
                self.claimer.begin_again()  # it took the rest that has begun for the end of the rows
            for claim in claims:
                await queue.put(claim)

    async def _work(self, queue: "asyncio.Queue[TokenClaim | None]") -> None:
        while (claim := await queue.get()) is not None:
            try:
                await self._serve(claim)
            except Exception as error:  # noqa: BLE001 (raised by `renew`: until then somebody must empty the queue)
                self._failure = error
                self.breaker.give_up(f"{type(error).__name__} while it was asked")

    async def _serve(self, claim: TokenClaim) -> None:
        await self.breaker.rested()
        asked = await self._ask(claim)
        if asked is None:
            await self.writer.put(Settlement(claim, self.counts))
        else:
            await self._take(claim, asked)

    async def _ask(self, claim: TokenClaim) -> "Asked | None":
        """Ask, by the other method too where that may help, and once more where nobody knows what happened."""
        used = self._auth
        asked = await self._send(claim, used)
        if asked and self._may_be_let_in_otherwise(asked.answer):
            # A client that isn't let in spends no refresh token. One after the other: a secret that is wrong is so by
            # both methods, which one finds out for all.
            async with self._other_method:
                another = self._auth if self._auth != used else other_method(used)
                again = None if self._neither_method else await self._send(claim, another)
                if again and isinstance(again.answer, Refused):
                    self._neither_method = True
                elif again:
                    asked, used = again, another
                if again and isinstance(again.answer, Renewed | Partial | Dead):
                    self._auth = another
        if asked and isinstance(asked.answer, Ambiguous):
            log.info(
                "oauth_request_repeated", provider=self.provider.name, oauth_id=claim.id, reason=asked.answer.reason
            )
            await asyncio.sleep(random.uniform(*_ASK_AGAIN_SECONDS))  # noqa: S311
            again = await self._send(claim, used)
            if again:
                known = isinstance(again.answer, Renewed | Partial | Dead)
                asked = replace(again, in_doubt=not known)
        return asked

    async def _send(self, claim: TokenClaim, client_auth: ClientAuth) -> "Asked | None":
        """Send one request as soon as there is queue for it; None when it must not be sent any more."""
        async with self.writer.slots:
            if not self._may_send(claim):
                return None
            asked_at = time.time()
            answer = await self.session.refresh(self.provider, claim.refresh_token, client_auth)
            return Asked(asked_at, answer, in_doubt=isinstance(answer, Ambiguous))

    async def _take(self, claim: TokenClaim, asked: "Asked") -> None:
        answer = asked.answer
        pause = self.breaker.record(answer)
        if isinstance(answer, Renewed | Partial):
            entry = self._entry(claim, asked.at, answer)
            self.writer.write_down(entry)
            settlement = Settlement(claim, self.counts, entry=entry)
        else:
            settlement = Settlement(claim, self.counts, failure=self._verdict(claim, answer, in_doubt=asked.in_doubt))
        if not isinstance(answer, Renewed):
            self._tell(claim, answer.reason)
        await self.writer.put(settlement)
        if pause:
            await self.breaker.hold(pause)

    def _verdict(self, claim: TokenClaim, answer: Dead | Refused | Transient | Ambiguous, *, in_doubt: bool) -> Failure:
        throttled = isinstance(answer, Transient) and answer.throttled
        return Failure(
            claim.id,
            claim.sent,
            self.id,
            dead=isinstance(answer, Dead),
            failed=in_doubt or (isinstance(answer, Transient) and not throttled),
            in_doubt=in_doubt,
            comes_last=isinstance(answer, Refused),
        )

    def _entry(self, claim: TokenClaim, asked_at: float, answer: Renewed | Partial) -> Entry:
        if isinstance(answer, Partial):
            return Entry(claim.id, claim.sent.hex(), asked_at, None, answer.refresh_token, None, False, None)
        if answer.lifespan is None and not self._lifespan_missed:
            self._lifespan_missed = True
            log.info("oauth_expiry_missing", provider=self.provider.name)
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

    def _may_be_let_in_otherwise(self, answer: Answer) -> bool:
        return isinstance(answer, Refused) and answer.authentication and not self.provider.auth_is_configured

    def _may_send(self, claim: TokenClaim) -> bool:
        """Not when the lease could end before the request does, as after a freeze of this process."""
        settings = self.writer.settings
        if self._is_over() or not self.breaker.may_send:
            return False
        return claim.good_for(settings.lease) > self.writer.longest_request.total_seconds()

    def _is_over(self) -> bool:
        return self.breaker.halted is not None or self.writer.is_ending()

    def _tell(self, claim: TokenClaim, reason: str) -> None:
        # The first of a provider stands for all of a run: what goes wrong for one goes wrong for many.
        level = log.debug if self.trouble else log.warning
        self.trouble = self.trouble or reason
        level("oauth_not_renewed", provider=self.provider.name, oauth_id=claim.id, reason=reason)
