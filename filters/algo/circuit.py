"""When to stop asking an upstream that fails, and how to find out that it is well again.

CLOSED ──failures──► OPEN ──after a while──► HALF_OPEN ──successes──► CLOSED
                      ▲                          │
                      └───────one failure────────┘

Libraries were considered. purgatory and aiobreaker wrap one awaited function and judge it when it
returns, aiobreaker is not kept any more, pybreaker is not for asyncio. None of them bounds the
probes of a half-open circuit, counts a rate over a window, or can be told of an attempt minutes
after it was let through, which is when a stream ends. So this one is our own. The same rules stand
in `filters/stores/circuits.lua`, for circuits that several processes share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

MAX_WINDOW_S = 600
"""The longest window that outcomes are counted over."""

PLACE_WAIT_S = 1.0
"""How soon to ask again when all probes of a half-open circuit are out: nobody knows how long they
take. Less when the circuit recovers quickly."""


class State(StrEnum):
    """What a circuit does with an attempt."""

    CLOSED = "closed"  # lets it through
    OPEN = "open"  # refuses it
    HALF_OPEN = "half_open"  # lets a few through, as probes


class Verdict(Enum):
    """What the end of an attempt says of its upstream."""

    SUCCESS = "success"
    FAILURE = "failure"
    NONE = "none"  # nothing: the client left, or the upstream was never asked


CLOSED, SUCCESS = State.CLOSED, Verdict.SUCCESS
"""By these names they are had in a tenth of the time: an enum of Python 3.11 calls a function."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When a circuit opens and closes; each question and report brings its own."""

    failure_threshold: int = 5
    """Failures one after the other that open it."""
    failure_rate: float | None = None
    """Share of failures in `window_s` that opens it instead, from `min_calls` outcomes on."""
    window_s: int = 30
    min_calls: int = 20
    recovery_timeout_s: float = 60.0
    """How long it stays open; doubled by every failed probe until it has closed again."""
    max_recovery_timeout_s: float = 600.0
    recovery_jitter: float = 0.1
    """Share by which that time is cut at random."""
    success_threshold: int = 3
    """Probes that must succeed to close it."""
    half_open_max: int = 3
    """Probes that may be out at a time."""
    probe_lease_s: float = 120.0
    """A probe that nobody reported for so long does not hold its place any more."""


class Admission(NamedTuple):
    """An attempt that was let through; `probe` is 0 for one that is no probe."""

    epoch: int
    probe: int


class Refusal(NamedTuple):
    """An attempt that was not; `wait_s` until another is worth a try, None: nobody knows."""

    wait_s: float | None


class View(NamedTuple):
    """What operators see of a circuit; `retry_in_s` is None when only an operator ends it."""

    state: State
    failures: int
    retry_in_s: float | None
    forced: State | None


class Circuit:
    """The circuit of one upstream and model. Times are of one clock, in seconds.

    Whatever it decides begins a new epoch, and a report counts only in the epoch that its attempt
    was let through in: what was under way when the circuit opened changes nothing any more. Probes
    hold their places across epochs, until they are reported or their lease is over.
    """

    __slots__ = (
        "_cells",
        "_last_probe",
        "_probes",
        "_reopened",
        "_seen_at",
        "_successes",
        "_until",
        "epoch",
        "failures",
        "forced",
        "name",
        "state",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.CLOSED
        self.forced: State | None = None
        self.failures = 0  # one after the other
        self.epoch = 0
        self._successes = 0  # of probes
        self._reopened = 0  # by failed probes, since it was closed
        self._until = 0.0  # while open
        self._last_probe = 0
        self._probes: dict[int, float] = {}  # that are out, and until when they hold their places
        self._cells: dict[int, list[int]] = {}  # outcomes and failures, by second
        self._seen_at = 0.0

    @property
    def probes(self) -> int:
        """Places held by probes."""
        return len(self._probes)

    def admit(self, rules: Rules, now: float) -> Admission | Refusal:
        """Whether an attempt may go; one that may must be reported."""
        if self.state is State.CLOSED:
            return Admission(self.epoch, 0)
        self._seen_at = now
        if self.state is State.OPEN:
            if self.forced is not None:
                return Refusal(None)
            if now < self._until:
                return Refusal(self._until - now)
            self.state = State.HALF_OPEN
            self._successes = 0
        self._probes = {probe: until for probe, until in self._probes.items() if until > now}
        if len(self._probes) >= rules.half_open_max:
            return Refusal(min(PLACE_WAIT_S, rules.recovery_timeout_s / 2))
        self._last_probe += 1
        self._probes[self._last_probe] = now + rules.probe_lease_s
        return Admission(self.epoch, self._last_probe)

    def report(
        self, rules: Rules, admission: Admission, verdict: Verdict, now: float, rand: float
    ) -> None:
        """The attempt is over. `rand` is a random number from 0 up to 1."""
        if admission.probe:
            self._probes.pop(admission.probe, None)
        if admission.epoch != self.epoch or self.forced is not None or verdict is Verdict.NONE:
            return
        if verdict is Verdict.SUCCESS:
            if self.state is State.HALF_OPEN:
                self._successes += 1
                if self._successes >= rules.success_threshold:
                    self._close()
                return
            self.failures = 0
            if rules.failure_rate is not None:
                self._cell(now)[0] += 1
            return
        self.failures += 1
        if self.state is State.HALF_OPEN:
            self._reopened += 1
            self._open(rules, now, rand)
        elif rules.failure_rate is None:
            if self.failures >= rules.failure_threshold:
                self._open(rules, now, rand)
        else:
            cell = self._cell(now)
            cell[0] += 1
            cell[1] += 1
            if self._fails_too_often(rules, rules.failure_rate, now):
                self._open(rules, now, rand)

    def force(self, state: State | None) -> None:
        """Hold it OPEN or CLOSED whatever happens; None: as new, and by itself again."""
        self._close()
        self.forced = state
        if state is not None:
            self.state = state

    def view(self, now: float) -> View:
        """Its state as it is shown."""
        retry_in_s: float | None = 0.0
        if self.state is State.OPEN:
            retry_in_s = None if self.forced else max(0.0, self._until - now)
        return View(self.state, self.failures, retry_in_s, self.forced)

    def _open(self, rules: Rules, now: float, rand: float) -> None:
        self.state = State.OPEN
        self.epoch += 1
        self._until = now + recovery_s(rules, self._reopened, rand)
        self._seen_at = now
        self._cells.clear()

    def _close(self) -> None:
        self.state = State.CLOSED
        self.epoch += 1
        self.failures = self._successes = self._reopened = 0
        self._cells.clear()

    def _cell(self, now: float) -> list[int]:
        """The counts of this second."""
        second = int(now)
        cell = self._cells.get(second)
        if cell is None:
            if len(self._cells) >= MAX_WINDOW_S:
                del self._cells[next(iter(self._cells))]  # the oldest
            cell = self._cells[second] = [0, 0]
        return cell

    def _fails_too_often(self, rules: Rules, rate: float, now: float) -> bool:
        count = failures = 0
        after = int(now) - rules.window_s
        for second, cell in self._cells.items():
            if second > after:
                count += cell[0]
                failures += cell[1]
        return count >= rules.min_calls and failures / count >= rate

    def __repr__(self) -> str:
        """As it was when somebody asked last."""
        view = self.view(self._seen_at)
        words = [self.name, view.state.name, f"failures={view.failures}"]
        if view.forced is not None:
            words.append("forced")
        elif view.state is State.OPEN:
            words.append(f"retry_in={view.retry_in_s:.1f}s")
        elif view.state is State.HALF_OPEN:
            words.append(f"probes={self.probes}")
        return f"<Circuit {' '.join(words)}>"


def recovery_s(rules: Rules, reopened: int, rand: float) -> float:
    """How long a circuit stays open that failed probes opened again so many times."""
    longest = max(rules.max_recovery_timeout_s, rules.recovery_timeout_s)
    grown = min(rules.recovery_timeout_s * 2.0 ** min(reopened, 60), longest)
    return grown * (1.0 - rules.recovery_jitter * rand)
