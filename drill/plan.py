"""What a drill does: how many calls of which kinds, who fails when, and with which configuration.

The drill has one target for each model, as fallback between targets is not what it tests. Of the
flaky provider's attempts 40 in 100 fail before the first byte; with the default of four, 0.4^4 =
2.6 % of the calls would fail although everything works as configured (a provider that ill is left
for another one in real life). So the settings below allow ten, and a budget for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

MAX_TOKENS = 64
"""What callers allow an answer; more than any has."""

ANSWER_EVENTS = 6
"""Content events of an answer, each an output token."""

FALLING = f"- {{events: {ANSWER_EVENTS}}}"
"""Well, as long as it is there."""

FLAKY = (
    """
- {share: 0.06, status: 500}
- {share: 0.05, status: 502}
- {share: 0.05, status: 503}
- {share: 0.04, status: 529}
- {share: 0.06, status: 429, retry_after: 1}
- {match: {model: "*-stream"}, share: 0.04, error_event: 0}
- {match: {model: "*-plain"}, share: 0.04, status: 504}
- {share: 0.10, hang: head}
- {match: {model: "*-stream"}, share: 0.02, die: events:1}
- {match: {model: "*-stream"}, share: 0.03, die: events:5}
- {match: {model: "*-plain"}, share: 0.05, die: events:1}
"""
    + FALLING
)
"""30 % errors, of which those inside a 200 as well; 10 % hangs; 5 % deaths after the first byte."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of calls. `model` tells provider and form: `gpt-flaky-stream`."""

    dialect: str
    provider: str
    is_stream: bool
    share: float
    words: int  # of the question, which are its input tokens

    @property
    def model(self) -> str:
        """The name that callers use."""
        form = "stream" if self.is_stream else "plain"
        return f"{'gpt' if self.dialect == 'openai' else 'claude'}-{self.provider}-{form}"


KINDS = tuple(
    Kind(dialect, provider, is_stream, share, words)
    for words, (dialect, provider, is_stream, share) in enumerate(
        [
            ("openai", "flaky", True, 0.2),
            ("openai", "flaky", False, 0.2),
            ("anthropic", "flaky", True, 0.2),
            ("anthropic", "flaky", False, 0.2),
            ("openai", "falling", True, 0.05),
            ("openai", "falling", False, 0.05),
            ("anthropic", "falling", True, 0.05),
            ("anthropic", "falling", False, 0.05),
        ],
        start=3,
    )
)


def label_of(model: str) -> str:
    """How metrics call the models of one provider and dialect: `gpt-flaky-*`."""
    return f"{model.rpartition('-')[0]}-*"


STREAMS = tuple(kind for kind in KINDS if kind.is_stream)

LEAVING_SHARE = 0.02
"""Of the callers: half of them before the first byte, half in mid-stream."""

TEAMS = {"search": "high", "support": "normal", "batch": "low"}
"""Names and priorities."""

BOUNDED_TEAM = "batch"
"""The one whose limit of calls at once is so near that it is reached."""


def team_key(team: str) -> str:
    """What this team's callers send."""
    return f"drill-key-of-{team}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One drill. Times are seconds from its first call."""

    rate: float = 500.0
    seconds: float = 60.0
    sidecars: int = 2
    outage_s: float = 10.0
    store_away_s: float = 1.0
    first_byte_s: float = 1.0
    deadline_s: float = 30.0
    seed: int = 1

    @property
    def store_goes_at(self) -> float:
        return self.seconds * 0.2

    @property
    def max_in_flight(self) -> int:
        """Calls that one sidecar lets in: enough for the usual load, not for the outage's."""
        return max(1, round(self.rate / self.sidecars * 1.8))

    @property
    def bounded_team_calls(self) -> int:
        """Calls at once of the bounded team, in all sidecars: in bad moments it has more."""
        return max(1, round(self.rate * 0.12))

    @property
    def outage_at(self) -> float:
        return self.seconds / 2 - self.outage_s / 2


SHORT = Plan(
    rate=100.0,
    seconds=7.0,
    outage_s=1.5,
    store_away_s=0.4,
    first_byte_s=0.5,
    deadline_s=10.0,
)
"""The same in some fifteen seconds."""


def write_config(folder: Path, plan: Plan, ports: Mapping[str, int], store_url: str) -> Path:
    """The configuration of one sidecar, with its teams, in `folder`. `ports` of the providers."""
    teams = folder / "teams"
    teams.mkdir(exist_ok=True)
    bound = f"filters: {{rate_limit: {{concurrency: {plan.bounded_team_calls}}}}}\n"
    for team, priority in TEAMS.items():
        digest = sha256(team_key(team).encode()).hexdigest()
        (teams / f"{team}.yaml").write_text(
            f"team: {team}\nkeys: [sha256:{digest}]\npriority: {priority}\n"
            + (bound if team == BOUNDED_TEAM else "")
        )
    (folder / "provider.key").write_text("drill-provider-key")
    path = folder / "config.yaml"
    path.write_text(
        CONFIG.format(
            store=store_url,
            log=folder / "access.log",
            flaky=ports["flaky"],
            falling=ports["falling"],
            max_in_flight=plan.max_in_flight,
            max_wait_s=plan.deadline_s,
            first_byte_s=plan.first_byte_s,
        )
    )
    return path


CONFIG = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
store: {store}
data_dir: state
teams: teams/*.yaml
log: {{access: {log}}}

upstreams:
  openai-flaky:
    dialect: openai
    base_url: http://127.0.0.1:{flaky}/v1
    wait_for: event
    sign: {{scheme: bearer, key: "file:provider.key"}}
    # Idle connections go soon, so that what is open at the end is in use, or leaked.
    pool: {{max_connections: 300, idle_s: 2}}
    # Four of ten attempts are failures here: no reason to leave it alone. Nine of ten would be.
    circuit_breaker: &seldom {{failure_rate: 0.9, window_s: 10, min_calls: 50}}
    # Its 429 are thrown dice and say nothing of the next attempt.
    upstream_limits: &unlearned {{concurrency: 1000, learn: false}}
  anthropic-flaky:
    dialect: anthropic
    base_url: http://127.0.0.1:{flaky}
    wait_for: event
    sign: {{scheme: header, name: x-api-key, key: "file:provider.key"}}
    pool: {{max_connections: 300, idle_s: 2}}
    circuit_breaker: *seldom
    upstream_limits: *unlearned
  openai-falling:
    dialect: openai
    base_url: http://127.0.0.1:{falling}/v1
    wait_for: event
    sign: {{scheme: bearer, key: "file:provider.key"}}
    pool: {{max_connections: 300, idle_s: 2}}
    circuit_breaker: &soon
      {{failure_threshold: 5, recovery_timeout_s: 1, max_recovery_timeout_s: 2, half_open_max: 3}}
    upstream_limits: &learned {{concurrency: 1000, requests_per_second: 5000}}
  anthropic-falling:
    dialect: anthropic
    base_url: http://127.0.0.1:{falling}
    wait_for: event
    sign: {{scheme: header, name: x-api-key, key: "file:provider.key"}}
    pool: {{max_connections: 300, idle_s: 2}}
    circuit_breaker: *soon
    upstream_limits: *learned

models:
  "gpt-flaky-*": [openai-flaky]
  "claude-flaky-*": [anthropic-flaky]
  "gpt-falling-*": [openai-falling]
  "claude-falling-*": [anthropic-falling]

chains:
  default:
    call: [request_id, metrics, access_log, ledger, rate_limit, token_budget, token_counter,
      priority_queue, retry]
    attempt: [circuit_breaker, timeout, upstream_limits, sign]

# Every call takes and gives back. None is refused, but by a bound in its team's file.
filters:
  # The store forgets everything in the midst of it.
  ledger: {{where: disk}}
  rate_limit: {{requests_per_second: 5000, concurrency: 2000}}
  token_budget: {{tokens_per_minute: 100000000}}
  # Calls to the provider that is down hold their places, so that others have to wait for theirs.
  priority_queue: {{max_in_flight: {max_in_flight}, max_wait_s: {max_wait_s}}}
  retry: {{max_attempts: 10, base_s: 0.1, max_s: 2, budget_share: 1.5}}
  timeout: {{first_byte_s: {first_byte_s}}}
"""
