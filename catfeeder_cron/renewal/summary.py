"""Count what was due in a run and with what result, in total and by provider, and log it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from catfeeder_cron.job import JobContext
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.provider import Provider
from catfeeder_cron.renewal.links import Due
from catfeeder_cron.renewal.provider_worker import ProviderWorker
from catfeeder_cron.renewal.providers import ProviderState

log = get_logger("catfeeder_cron.oauth")

COUNTS = ("due", "renewed", "needs_reauth", "failed", "postponed")

_NO_PROVIDER = "its service has no row in the table of providers"
_NO_SERVICE = "their service_id is none of the table of services"

Known = Mapping[str, tuple[Provider, ProviderState]]


@dataclass(frozen=True)
class Hindrance:
    """Why nothing can be renewed at a provider. `ours`: the operator can remove the reason."""

    reason: str
    ours: bool


def name_of(due: Due) -> str:
    """Return the name under which the rows are counted: their provider's, else their service's."""
    return due.provider or due.service or "(no service)"


def hindrances(due: Sequence[Due], known: Known) -> dict[str, Hindrance]:
    """Return the providers that can't be asked at all, each with the reason."""
    return {name_of(each): hindrance for each in due if (hindrance := _hindrance(each, known))}


def _hindrance(due: Due, known: Known) -> Hindrance | None:
    if due.provider is None or due.provider not in known:  # its row may have gone since the rows were counted
        return Hindrance(_NO_SERVICE if due.service is None else _NO_PROVIDER, ours=True)
    provider, state = known[due.provider]
    if provider.fault:
        return Hindrance(provider.fault, ours=True)
    if state.paused_seconds > 0:
        return Hindrance(f"paused for {state.paused_seconds:.0f} s more: {state.reason}", ours=state.refused)
    return None


def count_what_would_be_done(
    context: JobContext, due: Sequence[Due], hindered: Mapping[str, Hindrance], wait: str | None
) -> None:
    """Set the counts of a dry run. A run would `wait` for this reason before it sends anything."""
    context.counts["would_renew"] = 0
    for each in due:
        name = name_of(each)
        free = 0 if name in hindered else each.free
        context.counts["would_renew"] += free
        context.by_provider[name] = Counter(would_renew=free, postponed=each.rows - free)
        reason = hindered[name].reason if name in hindered else wait or each.why_not_free()
        if reason:
            context.provider_reasons[name] = reason


def count_so_far(context: JobContext, workers: Sequence[ProviderWorker]) -> None:
    """Update the counts that are known while the run is under way."""
    for name in ("renewed", "needs_reauth", "failed"):
        context.counts[name] = sum(worker.counts[name] for worker in workers)


def settle_up(
    context: JobContext,
    due: Sequence[Due],
    hindered: Mapping[str, Hindrance],
    workers: Sequence[ProviderWorker],
    left: Mapping[str, int],
) -> None:
    """Set all counts, and log those of each provider. `left` counts the rows that could still be claimed."""
    count_so_far(context, workers)
    by_name = {worker.provider.name: worker for worker in workers}
    for each in due:
        name = name_of(each)
        worker = by_name.get(name)
        counts = Counter({key: worker.counts[key] if worker else 0 for key in COUNTS})
        counts["postponed"] += each.rows - each.leased - each.free + (left.get(name, 0) if worker else each.free)
        counts["due"] = sum(counts[key] for key in COUNTS if key != "due")
        if not counts["due"]:
            continue
        context.by_provider[name] = counts
        reasons = (worker.breaker.halted, worker.trouble) if worker else ()
        reason = hindered[name].reason if name in hindered else next(filter(None, reasons), each.why_not_free())
        if reason and counts["due"] > counts["renewed"]:
            context.provider_reasons[name] = reason
        reason_field = {"reason": context.provider_reasons[name]} if name in context.provider_reasons else {}
        log.info("oauth_provider_finished", provider=name, **counts, **reason_field)
    for key in ("due", "postponed"):
        context.counts[key] = sum(counts[key] for counts in context.by_provider.values())
