"""Send the requests of one provider in one run, a few at a time, and hand their answers to the batch writer."""

import asyncio
import random
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
from catfeeder_cron.renewal.batch_writer import BatchWriter
from catfeeder_cron.renewal.circuit_breaker import CircuitBreaker
from catfeeder_cron.renewal.claims import Claimer, TokenClaim
from catfeeder_cron.renewal.entries import Entry, RequestTime
from catfeeder_cron.renewal.failures import Failure
from catfeeder_cron.renewal.settlements import Settlement

if TYPE_CHECKING:
    from catfeeder_cron.oauth.session import Session

log = get_logger("catfeeder_cron.oauth")

_ASK_AGAIN_SECONDS = (1.0, 2.0)


@dataclass(frozen=True)
class Asked:
    """The last answer to a claim's requests. `in_doubt`: the provider may have acted, with an unknown result."""

    at: RequestTime
    answer: Answer
    in_doubt: bool


@dataclass(eq=False)
class ProviderWorker:
    """Renews the due rows of one provider in one run. Made and used inside one event loop, so it needs no thread lock.

    Its tasks: `renew` claims rows into a queue, and `provider.concurrency` requesters take them out and send them.
    """

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
        # Held by the requester that tries the other authentication method, so that the others wait for its result.
        self._other_method = asyncio.Lock()
        self._neither_method = False

    async def renew(self) -> None:
        """Renew the due rows until none is left, the circuit breaker halts the provider, or the run ends.

        A second call takes the rows that the first one could not claim: locked ones, and ones that were given back.
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
        with suppress(DatabaseUnavailable):  # a method that is not stored is found again by the next run
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
                self.claimer.begin_again()  # a rest began meanwhile, and a resting provider's rows can't be claimed
            self.writer.kept.refresh()
            for claim in claims:
                # A row that went back holds a refresh token that was sent before, to which this host has the answer.
                if kept := self.writer.kept.find(claim.sent, self.provider.name):
                    await self.writer.put(Settlement(claim, self.counts, entry=kept.of_row(claim.id), again=True))
                else:
                    await queue.put(claim)

    async def _work(self, queue: "asyncio.Queue[TokenClaim | None]") -> None:
        while (claim := await queue.get()) is not None:
            try:
                await self._serve(claim)
            except Exception as error:  # noqa: BLE001 (`renew` raises it; until then this task must empty the queue)
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
        """Ask the provider; ask again by the other method where that may help, or where the result is unknown."""
        used = self._auth
        asked = await self._send(claim, used)
        if asked and self._may_use_other_method(asked.answer):
            # A client that fails to authenticate spends no refresh token. Under the lock, one requester tries the other
            # method and the others use its result: a wrong secret is wrong by both methods.
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
        """Send one request as soon as a slot is free; return None when it must not be sent any more."""
        async with self.writer.slots:
            if not self._may_send(claim):
                return None
            with self.writer.room_for_answer() as has_room:
                if not has_room:
                    return None
                asked_at = RequestTime.now()
                answer = await self.session.refresh(self.provider, claim.refresh_token, client_auth)
            # Nothing is awaited before the answer is in the journal, so its room is not given to another request.
            return Asked(asked_at, answer, in_doubt=isinstance(answer, Ambiguous))

    async def _take(self, claim: TokenClaim, asked: "Asked") -> None:
        answer = asked.answer
        pause = self.breaker.record(answer)
        if isinstance(answer, Renewed | Partial):
            entry = self._entry(claim, asked.at, answer)
            self.writer.write_down(entry)
            settlement = Settlement(claim, self.counts, entry=entry)
        else:
            settlement = Settlement(claim, self.counts, failure=self._failed(claim, answer, in_doubt=asked.in_doubt))
        if not isinstance(answer, Renewed):
            self._log_failure(claim, answer.reason)
        await self.writer.put(settlement)
        if pause:
            await self.breaker.hold(pause)

    def _failed(self, claim: TokenClaim, answer: Dead | Refused | Transient | Ambiguous, *, in_doubt: bool) -> Failure:
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

    def _entry(self, claim: TokenClaim, asked: RequestTime, answer: Renewed | Partial) -> Entry:
        if isinstance(answer, Partial):
            return Entry(
                id=claim.id,
                sent=claim.sent.hex(),
                asked_at=asked.at,
                token=None,
                refresh_token=answer.refresh_token,
                lifespan=None,
                lifespan_is_said=False,
                refresh_lifespan=None,
                asked_elapsed=asked.elapsed,
                boot=asked.boot,
                provider=self.provider.name,
            )
        if answer.lifespan is None and not self._lifespan_missed:
            self._lifespan_missed = True
            log.info("oauth_expiry_missing", provider=self.provider.name)
        usual = int(self.provider.access_lifetime.total_seconds())
        return Entry(
            id=claim.id,
            sent=claim.sent.hex(),
            asked_at=asked.at,
            token=answer.token,
            refresh_token=answer.refresh_token,
            lifespan=usual if answer.lifespan is None else answer.lifespan,
            lifespan_is_said=answer.lifespan is not None,
            refresh_lifespan=answer.refresh_lifespan,
            asked_elapsed=asked.elapsed,
            boot=asked.boot,
            provider=self.provider.name,
        )

    def _may_use_other_method(self, answer: Answer) -> bool:
        return isinstance(answer, Refused) and answer.authentication and not self.provider.auth_is_configured

    def _may_send(self, claim: TokenClaim) -> bool:
        """Return whether the lease outlasts the request. It may not, for example after this process was frozen."""
        settings = self.writer.settings
        if self._is_over() or not self.breaker.may_send:
            return False
        return claim.good_for(settings.lease) > self.writer.longest_request.total_seconds()

    def _is_over(self) -> bool:
        return self.breaker.halted is not None or self.writer.is_ending()

    def _log_failure(self, claim: TokenClaim, reason: str) -> None:
        # Only the first failure of a provider in a run is a warning: most failures hit many rows alike.
        level = log.debug if self.trouble else log.warning
        self.trouble = self.trouble or reason
        level("oauth_not_renewed", provider=self.provider.name, oauth_id=claim.id, reason=reason)
