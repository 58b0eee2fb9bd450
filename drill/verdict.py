"""Whether a drill went well: each promise, with the figures that show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import ge
from typing import NamedTuple

from drill.callers import GRACE_S, Ending
from drill.evidence import Evidence
from drill.plan import BOUNDED_TEAM, KINDS, TEAMS, label_of

KINDS_OF_TOKENS = ("input", "output")
ANSWERED_SHARE = 0.995
AFTERMATH_S = 5.0
"""After the outage, until those who waited are served."""
LATE_S = 0.25
"""Callers whose 99th percentile starts later than that do not make the load they say."""
LET_GO_S = 0.5
"""After a caller left, until no provider works for it: milliseconds, but all share the cores."""
CLOCKS_S = 0.02
"""The providers' clock is that of the event loop, which stands still while the loop works."""


class Check(NamedTuple):
    """One promise."""

    promise: str
    figures: str
    holds: bool


def checks(evidence: Evidence) -> Iterator[Check]:
    """Every promise of the drill."""
    yield from _settlement(evidence)
    yield from _ledger(evidence)
    yield from _leftovers(evidence)
    yield _breaker(evidence)
    yield from _answers(evidence)
    yield _leavers(evidence)
    yield _refusals(evidence)
    yield from _retries(evidence)
    yield _load(evidence)


def report(evidence: Evidence, found: Sequence[Check]) -> str:
    """Tables for people; the last line is the verdict."""
    lines = [f"{name:<50} {figures}" for name, figures in _figures(evidence)]
    lines += ["", *(f"{'ok  ' if c.holds else 'FAIL'} {c.promise}: {c.figures}" for c in found)]
    return "\n".join([*lines, "", _verdict(evidence, found)])


def _verdict(evidence: Evidence, found: Sequence[Check]) -> str:
    failed = [check.promise for check in found if not check.holds]
    asked, full = _healthy(evidence)
    attempts = sum(map(len, evidence.ledger.attempts.values()))
    words = (
        f"{len(evidence.calls)} calls at {_calls_per_s(evidence):.0f}/s, {attempts} attempts, "
        f"{_share(full, asked)} answered in full, {len(found) - len(failed)} of {len(found)} hold"
    )
    return f"drill failed: {words}: {'; '.join(failed)}" if failed else f"drill passed: {words}"


# Settlement


def _settlement(evidence: Evidence) -> Iterator[Check]:
    figures, accounts = evidence.figures, evidence.accounts
    settled = figures.by("llm_sidecar_budget_tokens", "team", "kind", "source")
    told = _told(evidence)
    for team in TEAMS:
        served = _pair(told, team)
        paid = [int(settled[team, kind, "reported"]) for kind in KINDS_OF_TOKENS]
        yield Check(
            f"settled usage of {team} is what the provider reported",
            f"input {paid[0]} of {served[0]}, output {paid[1]} of {served[1]}",
            paid == served and min(served) > 0,
        )
    tokens = figures.by("llm_api_tokens", "model", "direction")
    for label in sorted({label_of(kind.model) for kind in KINDS}):
        seen, used = _pair(tokens, label), _pair(accounts.used, label)
        served = _pair(told, label)
        yield Check(
            f"counted usage of {label} is that of the ledger, and no less than was reported",
            f"input {seen[0]} of {used[0]}, output {seen[1]} of {used[1]}",
            seen == used and min(served) > 0 and all(map(ge, used, served)),
        )
    made = int(figures.total("llm_sidecar_budget_reservations"))
    ended = figures.by("llm_sidecar_budget_settlements", "source")
    words = ", ".join(f"{int(number)} {source}" for (source,), number in sorted(ended.items()))
    refused = sum(call.is_refused for call in evidence.calls)
    left_early = sum(call.left_early for call in evidence.calls)
    most = len(evidence.calls) - refused
    yield Check(
        "each reservation was settled once",
        f"{made} reservations; {words}",
        # Who left early may have done so before anything was reserved.
        made == sum(ended.values()) and most - left_early <= made <= most,
    )


def _ledger(evidence: Evidence) -> Iterator[Check]:
    accounts, told = evidence.accounts, _told(evidence)
    for name in [*TEAMS, *sorted({label_of(kind.model) for kind in KINDS})]:
        served, entered = _pair(told, name), _pair(accounts.reported, name)
        yield Check(
            f"the ledger has of {name} what the provider reported",
            f"input {entered[0]} of {served[0]}, output {entered[1]} of {served[1]}",
            entered == served and min(served) > 0,
        )
    seen = sum(bool(evidence.attempts(call)) for call in evidence.calls)
    refused = sum(call.is_refused for call in evidence.calls)
    yield Check(
        "each call that a provider saw is in the ledger once",
        f"{accounts.calls} calls; providers saw {seen}",
        # A provider that was down saw nothing of those that were meant for it.
        seen <= accounts.calls <= len(evidence.calls) - refused,
    )


def _told(evidence: Evidence) -> Counter[tuple[str, str]]:
    """What the providers told, by team or label, and `input` or `output`."""
    told: Counter[tuple[str, str]] = Counter()
    for call in evidence.calls:
        for attempt in evidence.attempts(call):
            if attempt.told is not None:
                for name in (call.team, label_of(call.kind.model)):
                    told[name, "input"] += attempt.told.input_tokens
                    told[name, "output"] += attempt.told.output_tokens
    return told


def _pair(tokens: Counter[tuple[str, str]] | Counter[tuple[str, ...]], name: str) -> list[int]:
    return [int(tokens[name, kind]) for kind in KINDS_OF_TOKENS]


# What is left


def _leftovers(evidence: Evidence) -> Iterator[Check]:
    left = evidence.leftovers
    words = ", ".join(f"{name} {getattr(left, name)}" for name in left.__slots__)
    yield Check("nothing is held at rest", words, left.are_none)
    failures = [
        line["event"]
        for line in evidence.log
        if line["event"].endswith("_failed") or line.get("level") == "error"
    ]
    yield Check(
        "no task, debt or settlement failed",
        f"{len(failures)} such lines {sorted(set(failures)) or ''}".rstrip(),
        not failures,
    )
    codes = evidence.exit_codes
    yield Check("the sidecars stopped with nothing open", f"exit codes {codes}", not any(codes))


def _breaker(evidence: Evidence) -> Check:
    changes = evidence.figures.by("llm_sidecar_circuit_transitions", "upstream", "to")
    falling: Counter[str] = Counter()
    flaky = 0
    for (upstream, to), number in changes.items():
        if upstream.endswith("falling"):
            falling[to] += int(number)
        else:
            flaky += int(number)
    words = ", ".join(f"{to} {falling[to]}" for to in ("open", "half_open", "closed"))
    return Check(
        "the breaker of the falling provider opened and closed, and no other",
        f"{words}; of the flaky one {flaky}",
        falling["open"] > 0 and falling["closed"] > 0 and not flaky,
    )


# What callers got


def _healthy(evidence: Evidence) -> tuple[int, int]:
    """Calls for which a healthy target existed within their deadline, and those answered in full.

    Not those whose caller left or that their team's limit refused, nor those that the provider
    broke off after the first byte, which nobody may try again, nor those of the falling provider
    whose whole deadline lay in its absence.
    """
    gone_at, back_at = evidence.outage
    asked = full = 0
    for call in evidence.calls:
        if call.ending is Ending.LEFT or call.is_refused:
            continue
        if any(attempt.broke for attempt in evidence.attempts(call)):
            continue
        gives_up_at = call.sent_at + evidence.plan.deadline_s
        if call.kind.provider == "falling" and gone_at <= call.sent_at and gives_up_at <= back_at:
            continue
        asked += 1
        full += call.ending is Ending.FULL
    return asked, full


def _answers(evidence: Evidence) -> Iterator[Check]:
    asked, full = _healthy(evidence)
    yield Check(
        f"at least {ANSWERED_SHARE:.1%} of the calls with a healthy target were answered in full",
        f"{full} of {asked}, {_share(full, asked)}",
        asked > 0 and full >= ANSWERED_SHARE * asked,
    )
    endings = Counter(call.ending for call in evidence.calls)
    bad = [Ending.UNCLEAR, Ending.LOST, Ending.HUNG]
    yield Check(
        "every other call got a clear error in its dialect",
        ", ".join(f"{ending}: {endings[ending]}" for ending in Ending)
        + f"; {evidence.stray_bytes} stray bytes",
        not any(endings[ending] for ending in bad) and not evidence.stray_bytes,
    )
    longest_s = max((call.done_at - call.sent_at for call in evidence.calls), default=0.0)
    allowed_s = evidence.plan.deadline_s + GRACE_S
    yield Check(
        "no call hung past its deadline",
        f"the longest took {longest_s:.1f} of {allowed_s:g} s",
        longest_s <= allowed_s,
    )


def _leavers(evidence: Evidence) -> Check:
    left = [call for call in evidence.calls if call.ending is Ending.LEFT]
    early = sum(call.left_early for call in left)
    longest_s = max(
        (each.finished_at - call.done_at for call in left for each in evidence.attempts(call)),
        default=0.0,
    )
    return Check(
        "no provider works on for a caller who left",
        f"{early} left before the first byte, {len(left) - early} in mid-stream; "
        f"let go after {max(0.0, longest_s) * 1e3:.1f} ms at most",
        0 < early < len(left) and longest_s <= LET_GO_S,
    )


def _refusals(evidence: Evidence) -> Check:
    refused = [call for call in evidence.calls if call.is_refused]
    clear = sum(
        call.team == BOUNDED_TEAM
        and call.ending is Ending.ERROR
        and call.status == 429
        and call.retry_after.isdecimal()
        and not evidence.attempts(call)
        for call in refused
    )
    limited = evidence.figures.by("llm_sidecar_limited", "team", "rule")
    counted = int(limited.pop((BOUNDED_TEAM, "concurrency"), 0))
    others = int(sum(limited.values()))
    left_early = sum(call.left_early for call in evidence.calls)
    return Check(
        f"the limit of {BOUNDED_TEAM} refused calls, clearly, and no other limit did",
        f"{len(refused)} refused, {clear} of them 429 with Retry-After and not sent on; "
        f"{counted} counted, of others {others}",
        # Who left early may have been refused and gone before being told.
        0 < len(refused) == clear <= counted <= clear + left_early and not others,
    )


def _retries(evidence: Evidence) -> Iterator[Check]:
    after_byte = second = unseen = 0
    for call in evidence.calls:
        attempts = evidence.attempts(call)
        if call.first_byte_at:
            limit = call.first_byte_at + CLOCKS_S
            after_byte += sum(attempt.arrived_at > limit for attempt in attempts)
        begun = [each.began_at is not None and not each.is_left for each in attempts]
        second += sum(begun[:-1])
        unseen += call.ending is Ending.FULL and not any(begun)
    yield Check(
        "nothing was tried again after its first byte",
        f"{after_byte} attempts after the caller's first byte, {second} after an answer had begun",
        not after_byte and not second,
    )
    yield Check(
        "every answer is in the provider's books",
        f"{unseen} are not, {evidence.ledger.strangers} requests of nobody",
        not unseen and not evidence.ledger.strangers,
    )


def _load(evidence: Evidence) -> Check:
    late = _sorted(call.sent_at - call.due_at for call in evidence.calls)
    return Check(
        "the callers held their rate",
        f"{_calls_per_s(evidence):.0f} of {evidence.plan.rate:g} calls/s; "
        f"started late by {_ms(late, 0.5)}, p99 {_ms(late, 0.99)}",
        bool(late) and _at(late, 0.99) <= LATE_S,
    )


# Figures


def _figures(evidence: Evidence) -> Iterator[tuple[str, str]]:
    calls, figures = evidence.calls, evidence.figures
    attempts = [evidence.attempts(call) for call in calls]
    yield "calls, and a second", f"{len(calls)}, {_calls_per_s(evidence):.1f}"
    made = Counter(map(len, attempts))
    yield (
        "attempts, and a call",
        f"{sum(map(len, attempts))}, {sum(map(len, attempts)) / max(1, len(calls)):.2f}",
    )
    yield "calls by attempts", " ".join(f"{n}:{made[n]}" for n in sorted(made))
    answers = [call for call in calls if call.ending is Ending.FULL]
    whole = _sorted(call.done_at - call.sent_at for call in answers)
    yield (
        "answered within, p50 / p99 / most",
        f"{_ms(whole, 0.5)} / {_ms(whole, 0.99)} / {_ms(whole, 1)}",
    )
    gone_at, back_at = evidence.outage
    added = _sorted(
        (call.first_byte_at - call.sent_at) - (only[0].began_at - only[0].arrived_at)
        for call, only in zip(calls, attempts, strict=True)
        # In the outage they waited: for the provider, or behind those that did.
        if not gone_at <= call.sent_at <= back_at + AFTERMATH_S
        and call.ending is Ending.FULL
        and len(only) == 1
        and only[0].began_at is not None
    )
    yield (
        "added to the first byte of first tries, p50 / p99",
        f"{_ms(added, 0.5)} / {_ms(added, 0.99)}",
    )
    p50, p99 = (figures.quantile("llm_sidecar_overhead_seconds", q) for q in (0.5, 0.99))
    yield "by the sidecars' own clock, at most", f"{p50 * 1e3:g} ms / {p99 * 1e3:g} ms"
    cpu = [f"{each / evidence.wall_s:.0%}" for each in evidence.cpu_s]
    each_call = sum(evidence.cpu_s) / max(1, len(calls)) * 1e6
    yield "CPU of the sidecars, and a call", f"{' + '.join(cpu)} of a core, {each_call:.0f} µs"
    for title, name, label in (
        ("retries by reason", "llm_sidecar_retries", "reason"),
        ("retries denied", "llm_sidecar_retries_denied", "why"),
        ("attempts refused by circuits", "llm_sidecar_circuit_refused", "upstream"),
        ("calls refused by limits", "llm_sidecar_limited", "rule"),
        ("store: errors", "llm_sidecar_store_errors", "reason"),
        ("store: decided without it", "llm_sidecar_store_fallbacks", "answer"),
    ):
        counted = figures.by(name, label)
        yield title, _words(counted)
    waits = figures.counts("llm_sidecar_queue_wait_seconds", "class")
    yield "waited in the queue", _words(waits)
    codes = Counter(
        f"{call.status} {call.code or '(cut off)'}"
        for call in calls
        if call.ending not in (Ending.FULL, Ending.LEFT)
    )
    yield "what others got", ", ".join(f"{code}: {n}" for code, n in codes.most_common(12))
    lines = Counter(line["event"] for line in evidence.log)
    yield "log lines", ", ".join(f"{event} {n}" for event, n in lines.most_common(12))


def _words(counted: Counter[tuple[str, ...]]) -> str:
    return ", ".join(f"{value} {int(n)}" for (value,), n in sorted(counted.items()) if n) or "none"


def _calls_per_s(evidence: Evidence) -> float:
    sent = [call.sent_at for call in evidence.calls if call.sent_at]
    return len(sent) / max(evidence.plan.seconds, max(sent) - min(sent)) if sent else 0.0


def _sorted(values: Iterator[float]) -> list[float]:
    return sorted(values)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _ms(ordered: Sequence[float], share: float) -> str:
    return f"{_at(ordered, share) * 1e3:.1f} ms"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if whole else "none"
