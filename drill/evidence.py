"""What a drill leaves behind, and how to ask it: calls, providers' books, figures, log lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from drill.accounts import Accounts
from drill.callers import CallRecord
from drill.plan import Plan
from drill.providers import Attempt, Ledger
from sidecar.metrics import FamilySnapshot


class Figures:
    """Metrics of all sidecars together."""

    def __init__(self, families: Sequence[FamilySnapshot]) -> None:
        self._families = {family["name"]: family for family in families}

    def by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """Sums of a counter or gauge by these labels; empty when nobody has counted."""
        found: Counter[tuple[str, ...]] = Counter()
        family = self._families.get(name)
        if family is not None:
            places = [family["labels"].index(label) for label in labels]
            for values, number in family["samples"]:
                found[tuple(values[place] for place in places)] += number
        return found

    def total(self, name: str) -> float:
        return sum(self.by(name).values())

    def counts(self, name: str, label: str) -> Counter[tuple[str, ...]]:
        """How many observations a histogram has, by this label."""
        found: Counter[tuple[str, ...]] = Counter()
        family = self._families.get(name)
        if family is not None:
            place = family["labels"].index(label)
            for values, (*each, _) in family["samples"]:
                found[values[place],] += sum(each)
        return found

    def quantile(self, name: str, share: float) -> float:
        """An upper bound of the quantile of a histogram, all labels together; inf: beyond."""
        family = self._families[name]
        counts = [0] * (len(family["bounds"]) + 1)
        for _, (*each, _) in family["samples"]:
            counts = [a + b for a, b in zip(counts, each, strict=True)]
        wanted, seen = share * sum(counts), 0
        for bound, count in zip(family["bounds"], counts, strict=False):
            seen += count
            if seen >= wanted:
                return bound
        return float("inf")


@dataclass(slots=True)
class Leftovers:
    """What is still held when every call is over; all of it should be nothing."""

    open_calls: float = 0
    in_flight: float = 0  # as the queue counts
    waiting: float = 0
    slots: int = 0  # in the store, of rate_limit and upstream_limits
    provider_requests: int = 0
    provider_connections: int = 0  # idle ones have had the time to go
    caller_connections: int = 0  # that the sidecars have not closed, though all callers left
    circuits_not_closed: list[str] = field(default_factory=list)

    @property
    def are_none(self) -> bool:
        return not any(getattr(self, name) for name in self.__slots__)


@dataclass(slots=True)
class Evidence:
    """A drill that is over. Times are those of `time.monotonic`."""

    plan: Plan
    calls: list[CallRecord]
    ledger: Ledger
    accounts: Accounts
    figures: Figures
    leftovers: Leftovers
    log: list[dict[str, Any]]  # lines of all sidecars
    outage: tuple[float, float]
    wall_s: float
    cpu_s: list[float]  # of each sidecar, during the calls
    exit_codes: list[int]
    stray_bytes: int

    def attempts(self, call: CallRecord) -> list[Attempt]:
        return self.ledger.attempts.get(call.number, [])
