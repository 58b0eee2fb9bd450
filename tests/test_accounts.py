"""Five thousand calls of every kind, and books that must agree: what the provider told, what the
ledger and the budgets have, and what callers found in their answers."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from decimal import Decimal
from hashlib import sha256
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
import uvloop

from filters.algo.estimate import tokens_of
from filters.algo.tokens import Vocabularies
from sidecar.mock.content import default_text
from tests.support.accounts import (
    CHAT,
    EMBEDDINGS,
    MAX_TOKENS,
    MESSAGES,
    Answer,
    Ask,
    Lines,
    Provider,
    Served,
    read,
)
from tests.support.process import finished, serving

CALLS = 5_000
AT_ONCE = 48
SEED = 20_260_105
TEAMS = ("search", "support", "batch")
EVENTS = {CHAT: 10, MESSAGES: 12}
"""Of a whole stream with six content events, `[DONE]` and the event with usage included."""
USAGE_AT = 9
"""The event of chat completions that has it."""

FRAMING = 8
"""Of a body that was cut, as tokens: what is no text may be taken for some."""
NEAR = 0.35
"""Two ways to count the tokens of a few words without their tokenizer differ by no more."""

FLAKY = """
- {match: {model: "*-flaky"}, share: 0.10, status: 503}
- {match: {model: "*-flaky"}, share: 0.08, status: 429}
- {match: {model: "*-flaky"}, share: 0.10, error_event: 0}
- {match: {model: "*-flaky"}, share: 0.06, die: head}
- {match: {model: "*-flaky"}, share: 0.06, die: events:3}
- {match: {model: "*-slow"}, delay_ms: 10}
- {match: {model: "*-late"}, first_delay_ms: 250}
"""

PRICES = {  # for a million tokens
    "gpt": ("0.15", "0.60", "USD"),
    "gpt-flaky": ("0.37", "1.11", "USD"),
    "gpt-slow": ("1.1", "4.4", "USD"),
    "gpt-late": ("0.9", "1.3", "USD"),
    "claude": ("2.13", "10.7", "CNY"),
    "claude-flaky": ("0.8", "3.2", "CNY"),
    "claude-slow": ("3", "15", "CNY"),
    "claude-late": ("0.01", "0.07", "CNY"),
    "embed": ("0.02", "0", "USD"),
}

DOLLARS_A_YUAN = Decimal("0.125")

CONFIG = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
log: {{access: {log}}}
data_dir: state
teams: teams/*.yaml
upstreams:
  openai: {{dialect: openai, base_url: "http://{address}/v1", wait_for: event, pool: {pool}}}
  anthropic: {{dialect: anthropic, base_url: "http://{address}", wait_for: event, pool: {pool}}}
models:
  "gpt*": [openai]
  "claude*": [anthropic]
  embed: [openai]
filters:
  retry: {{max_attempts: 4, base_s: 0.004, budget_share: 10, budget_min_per_s: 1000}}
  circuit_breaker: {{failure_threshold: 1000000}}
  cost: {{prices: {prices}, exchange: {{CNY: {dollars_a_yuan}}}}}
  budget:
    {{tokens_per_month: 1000000000, usd_per_month: 1000000, cny_per_month: 1000000, per: [team]}}
chains:
  default:
    call:
      [request_id, metrics, access_log, ledger, rate_limit, token_budget, cost, budget,
       token_counter, cache, priority_queue, retry]
    attempt: [circuit_breaker, timeout, upstream_limits, sign]
"""


def write_config(folder: Path, address: str) -> Path:
    (folder / "teams").mkdir()
    for team in TEAMS:
        digest = sha256(key_of(team).encode()).hexdigest()
        (folder / "teams" / f"{team}.yaml").write_text(f"team: {team}\nkeys: [sha256:{digest}]\n")
    prices = {
        model: {"input": float(tokens_in), "output": float(tokens_out), "currency": currency}
        for model, (tokens_in, tokens_out, currency) in PRICES.items()
    }
    path = folder / "config.yaml"
    log = folder / "access.log"
    pool = "{max_connections: 300}"
    values = {"log": log, "address": address, "pool": pool, "prices": json.dumps(prices)}
    path.write_text(CONFIG.format(**values, dollars_a_yuan=DOLLARS_A_YUAN))
    return path


def key_of(team: str) -> str:
    return f"accounts-key-of-{team}"


# The calls

Scene = Callable[[], Awaitable[None]]


class Crowd:
    """All callers. A scene is one call, or some that belong together."""

    def __init__(self, lines: Lines, provider: Provider) -> None:
        self.asks: list[Ask] = []
        self.groups: list[list[Ask]] = []
        """Calls that are for one answer."""
        self._lines = lines
        self._provider = provider
        self._chance = Random(SEED)

    async def run(self) -> None:
        """All scenes, some at once, in an order by chance."""
        scenes = list(self._scenes())
        self._chance.shuffle(scenes)
        waiting = iter(scenes)

        async def work() -> None:
            for scene in waiting:
                await scene()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())

    def _scenes(self) -> Iterator[Scene]:
        for _ in range(1300):
            yield self._alone(self._any())
        for _ in range(800):
            yield self._alone(self._any("-flaky"))
        for _ in range(1200):  # few questions, asked again and again in all forms
            ask = self._any(temperature=0.0)
            ask.team, ask.text = self._chance.choice(TEAMS), f"one of {self._chance.randrange(40)}"
            yield self._alone(ask)
        for number in range(240):
            yield self._alone(self._ask(EMBEDDINGS, "embed", text=f"vector of {number % 80}"))
        for _ in range(120):
            ask = self._any(headers={"x-mock-hang": "head"})
            yield self._leaves_before_the_head(ask)
        for number in range(240):  # also right at the end: all but [DONE], all but the last chunk
            ask = self._any(is_stream=True)
            at = 1 + number % EVENTS[ask.path]
            if ask.path == CHAT and not ask.wants_usage and at >= USAGE_AT:
                at, ask.leaves_after = EVENTS[CHAT], EVENTS[CHAT] - 1  # one is taken out
            else:
                ask.leaves_after = at
            ask.headers = {"x-mock-hang": f"events:{at}"}
            yield self._alone(ask)
        for _ in range(60):  # between the last byte and the end
            ask = self._any(is_stream=True)
            ask.leaves_at = b"[DONE]" if ask.path == CHAT else b'"message_stop"'
            yield self._alone(ask)
        for _ in range(60):
            ask = self._any(is_stream=False, headers={"x-mock-hang": "events:1"})
            yield self._leaves_before_the_head(ask)
        for number in range(240):
            ask = self._any(headers={"x-mock-die": f"events:{1 + number % 9}"})
            if not ask.is_stream:
                ask.headers = {"x-mock-die": "events:1"}
            yield self._alone(ask)
        for number in range(120):
            at = 1 + number % 8
            yield self._alone(self._any(is_stream=True, headers={"x-mock-error-event": f"{at}"}))
        for _ in range(120):
            yield self._alone(self._any(headers={"x-mock-usage": "none"}))
        for number in range(100):
            yield self._shared(number)

    # One call

    def _ask(self, path: str, model: str, **more: Any) -> Ask:
        number = len(self.asks)
        team = more.pop("team", TEAMS[number % len(TEAMS)])
        text = more.pop("text", f"question {number}" + " word" * (number % 7))
        ask = Ask(f"accounts-{number}", team, model, path, text, **more)
        self.asks.append(ask)
        return ask

    def _any(self, kind: str = "", **more: Any) -> Ask:
        chance = self._chance
        more.setdefault("is_stream", chance.random() < 0.6)
        if chance.random() < 0.5:
            return self._ask(MESSAGES, f"claude{kind}", **more)
        wants_usage = more["is_stream"] and chance.random() < 0.5
        return self._ask(CHAT, f"gpt{kind}", wants_usage=wants_usage, **more)

    def _alone(self, ask: Ask) -> Scene:
        return lambda: self._make(ask)

    async def _make(self, ask: Ask) -> None:
        async with self._lines.line() as line:
            await line.begin(ask, key_of(ask.team))

    def _leaves_before_the_head(self, ask: Ask) -> Scene:
        async def play() -> None:
            async with self._lines.line() as line:
                done = line.begin(ask, key_of(ask.team))
                await self._provider.has(ask.id)
                line.leave()
                await done

        return play

    # Calls for one answer

    def _shared(self, number: int) -> Scene:
        """Five at once; who of them leaves, and when, is different each time."""
        kind = ("-slow", "-late", "", "", "-flaky")[number % 5]
        first = self._any(kind, is_stream=number % 2 == 0 or kind == "", temperature=0.0)
        group = [first] + [
            self._ask(
                *(first.path, first.model),
                team=first.team,
                text=first.text,
                is_stream=first.is_stream,
                temperature=0.0,
                wants_usage=bool(first.path == CHAT and first.is_stream and index % 2),
            )
            for index in range(4)
        ]
        self.groups.append(group)
        match number % 5:
            case 0:  # the one who pays leaves
                first.leaves_after = 2 if first.is_stream else None
                return lambda: self._together(group)
            case 1:  # before anything came
                return lambda: self._together(group, first_leaves=True)
            case 2:  # all leave, one after the other
                for index, ask in enumerate(group):
                    ask.headers = {"x-mock-hang": f"events:{5}"}
                    ask.leaves_after = 1 + index
                return lambda: self._together(group)
            case 3:  # it breaks off for all
                for ask in group:
                    ask.headers = {"x-mock-die": "events:4"}
                return lambda: self._together(group)
            case _:
                if number % 10 == 4:  # it is refused for all, again and again
                    for ask in group:
                        ask.headers = {"x-mock-status": "503"}
                return lambda: self._together(group)

    async def _together(self, group: list[Ask], *, first_leaves: bool = False) -> None:
        key = key_of(group[0].team)
        async with AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(self._lines.line()) for _ in group]
            begun = [lines[0].begin(group[0], key)]
            if first_leaves:
                await self._provider.has(group[0].id)
            pairs = zip(lines[1:], group[1:], strict=True)
            begun += [line.begin(ask, key) for line, ask in pairs]
            if first_leaves:
                async with self._lines.line() as other:
                    for _ in range(3):  # then all of them have been seen
                        await other.look(key)
                lines[0].leave()
            await asyncio.gather(*begun)


# The books

SUMS = """SELECT team, model, status, outcome, cached, is_estimated, currency, SUM(calls),
    SUM(input_tokens), SUM(output_tokens), SUM(attempts) FROM calls GROUP BY 1, 2, 3, 4, 5, 6, 7"""
REPORTED = """SELECT team, model, SUM(reported_input_tokens), SUM(reported_output_tokens),
    SUM(lost_input_tokens), SUM(lost_output_tokens) FROM calls GROUP BY 1, 2"""
SPENT = "SELECT account, SUM(spent), SUM(reserved) FROM spending GROUP BY 1"


@dataclass(frozen=True, slots=True)
class Line:
    """One call in the access log."""

    id: str
    team: str
    model: str
    status: int
    outcome: str
    cached: str
    is_estimated: bool
    input: int
    output: int
    cost: Decimal
    currency: str | None
    attempts: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Line:
        return cls(
            *(fields["id"], fields["team"], fields["model"], fields["status"], fields["outcome"]),
            cached=fields.get("cached", ""),
            is_estimated=fields.get("is_estimated", False),
            input=fields.get("input_tokens", 0),
            output=fields.get("output_tokens", 0),
            cost=Decimal(fields.get("cost", "0")),
            currency=fields.get("currency"),
            attempts=fields["attempts"],
        )

    @property
    def has_record(self) -> bool:
        """Whether the ledger has it: an upstream was asked, or a cache answered."""
        return bool(self.attempts or self.cached)


@dataclass
class Accounts:
    """Everything, when all is over, by the ids of the calls."""

    asks: dict[str, Ask]
    answers: dict[str, Answer | None]
    groups: list[list[str]]
    served: dict[str, list[Served]]
    told: dict[str, tuple[int, int]]
    """By model, as the provider's own books have it."""
    lines: dict[str, Line]
    sums: list[tuple[Any, ...]]
    """As the ledger has them for calls that are alike."""
    reported: dict[tuple[str, str], tuple[int, int, int, int]]
    """By team and model: what the ledger has as reported, and as lost."""
    budgets: dict[tuple[str, str], tuple[int, int]]
    """By what is counted and team: spent, and still reserved."""
    usage: list[dict[str, Any]]
    """As `sidecar usage` prints it."""

    def last_served(self, line: Line) -> Served:
        """The attempt that a call ended with: its own, or that of the one whose place it took."""
        if line.id in self.served:
            return self.served[line.id][-1]
        group = self._group_of(line.id)
        others = [each for each in group if each in self.served and self.lines[each].cached]
        return self.served[others[0]][-1]  # there may be two: then they went the same way

    def failures_beside(self, call_id: str) -> set[int]:
        """What a call may be refused with whose answer others of its group asked for: with what
        the provider told them in the end, or with 502 where it told nothing whole."""
        asked = [each for each in self._group_of(call_id) if each in self.served]
        last = [self.served[each][-1].status for each in asked]
        return {status if status and status >= 400 else 502 for status in last}

    def _group_of(self, call_id: str) -> list[str]:
        (group,) = (each for each in self.groups if call_id in each)
        return group


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Accounts:
    return uvloop.run(made(tmp_path_factory.mktemp("accounts")))


async def made(folder: Path) -> Accounts:
    provider = Provider(FLAKY)
    config = write_config(folder, await provider.start())
    try:
        async with serving(config) as sidecar:
            host, _, port = sidecar.address.rpartition(":")
            connections = Lines(host, int(port))
            crowd = Crowd(connections, provider)
            await crowd.run()
            connections.close()
            await provider.rests()
            assert await sidecar.end() == 0
            assert not sidecar.errors
            assert not [line for line in sidecar.log if line["level"] == "error"], sidecar.log
    finally:
        await provider.stop()
    with closing(sqlite3.connect(folder / "state" / "ledger.db")) as ledger:
        sums = ledger.execute(SUMS).fetchall()
        reported = {(team, model): tuple(n) for team, model, *n in ledger.execute(REPORTED)}
    with closing(sqlite3.connect(folder / "state" / "budgets.db")) as spending:
        budgets = {_account(key): (spent, left) for key, spent, left in spending.execute(SPENT)}
    log = [orjson.loads(text) for text in (folder / "access.log").read_bytes().splitlines()]
    lines = [Line.of(fields) for fields in log if fields["endpoint"] != "models"]
    assert len({line.id for line in lines}) == len(lines)
    asked = ("--config", str(config), "--by", "model", "--since", "1h", "--format", "json")
    printed = await finished("usage", *asked)
    assert printed.code == 0, printed.err
    return Accounts(
        {ask.id: ask for ask in crowd.asks},
        {ask.id: read(ask) for ask in crowd.asks},
        [[ask.id for ask in group] for group in crowd.groups],
        provider.served,
        {
            name: (book.told_input_tokens, book.told_output_tokens)
            for name, book in provider.books.models.items()
        },
        {line.id: line for line in lines},
        sums,
        reported,
        budgets,
        json.loads(printed.out, parse_float=Decimal),
    )


def _account(key: str) -> tuple[str, str]:
    """What is counted, and the team, of `usd|month 2026-01-01|team=search`."""
    kind, _, who = key.split("|")
    return kind, who.removeprefix("team=")


def test_ledger_has_what_the_provider_told_of_each_model(accounts: Accounts) -> None:
    reported: Counter[tuple[str, str]] = Counter()
    for (_, model), (tokens_in, tokens_out, *_) in accounts.reported.items():
        reported += Counter({(model, "in"): tokens_in, (model, "out"): tokens_out})
    assert accounts.told.keys() == PRICES.keys()
    for model, told in accounts.told.items():
        assert (reported[model, "in"], reported[model, "out"]) == told, model


def test_ledger_has_what_the_provider_told_the_callers_of_each_team(accounts: Accounts) -> None:
    reported: Counter[tuple[str, str]] = Counter()
    for (team, _), (tokens_in, tokens_out, *_) in accounts.reported.items():
        reported += Counter({(team, "in"): tokens_in, (team, "out"): tokens_out})
    told: Counter[tuple[str, str]] = Counter()
    for call_id, several in accounts.served.items():
        for served in several:
            if served.told is not None:
                told[accounts.asks[call_id].team, "in"] += served.told.input_tokens
                told[accounts.asks[call_id].team, "out"] += served.told.output_tokens
    assert reported == told
    assert {team for team, _ in told} == set(TEAMS)


def test_ledger_adds_up_the_calls_of_the_access_log(accounts: Accounts) -> None:
    logged: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for line in accounts.lines.values():
        if line.has_record:
            kind = (line.team, line.model, line.status, line.outcome, line.cached)
            sums = logged[*kind, int(line.is_estimated), line.currency]
            for index, number in enumerate((1, line.input, line.output, line.attempts)):
                sums[index] += number
    assert {each[:7]: list(each[7:]) for each in accounts.sums} == logged


def test_every_call_is_logged_once_and_every_attempt_counted(accounts: Accounts) -> None:
    assert accounts.lines.keys() == accounts.asks.keys()
    assert len(accounts.lines) == CALLS
    refused = set()
    for call_id, line in accounts.lines.items():
        ask = accounts.asks[call_id]
        assert (line.team, line.model) == (ask.team, ask.model)
        if not line.has_record:  # it waited for an answer of another one's, who was refused
            answer = accounts.answers[call_id]
            assert answer is not None
            assert answer.headers["x-sidecar-cache"] == "join"
            assert answer.status in accounts.failures_beside(call_id)
            refused.add(call_id)
    assert len(refused) > 10
    shared = {call_id for group in accounts.groups for call_id in group}
    for group in [*accounts.groups, *([each] for each in accounts.lines if each not in shared)]:
        attempts = sum(accounts.lines[each].attempts for each in group)
        assert attempts == sum(len(accounts.served.get(each, ())) for each in group), group


def test_cached_calls_are_those_that_callers_saw(accounts: Accounts) -> None:
    """Who pays may leave: then another one, who was told `join`, takes the place."""
    by_word: defaultdict[str, set[str]] = defaultdict(set)
    for call_id, line in accounts.lines.items():
        if line.has_record:
            answer = accounts.answers[call_id]
            by_word[answer.headers["x-sidecar-cache"] if answer else "none"].add(call_id)
    cached = {call_id for call_id, line in accounts.lines.items() if line.cached}
    assert by_word["hit"] == {each for each in cached if accounts.lines[each].cached == "hit"}
    assert not by_word["bypass"] & cached
    passed_on = (by_word["miss"] | by_word["none"]) & cached
    took_over = by_word["join"] - cached
    assert len(took_over) == len(passed_on)
    assert all(accounts.asks[each].has_left for each in passed_on)
    assert sum(each["cached_calls"] for each in accounts.usage) == len(cached)
    assert min(len(by_word["hit"]), len(by_word["join"]), len(by_word["miss"])) > 100
    assert len(passed_on) > 10


def test_only_what_the_provider_did_not_tell_to_the_end_is_marked_estimated(
    accounts: Accounts,
) -> None:
    """Calls that it cut, or whose callers left, or of which it told nothing; cached ones are
    nobody's to estimate."""
    wrong = []
    estimated = 0
    for line in accounts.lines.values():
        expected = bool(line.attempts and not line.cached and not _was_told(accounts, line))
        if line.is_estimated != expected:
            wrong.append((accounts.asks[line.id].headers, line))
        estimated += expected
    assert not wrong, f"{len(wrong)}, the first of them {wrong[:3]}"
    assert estimated > 500


def _was_told(accounts: Accounts, line: Line) -> bool:
    """Whether the provider told the call's usage, and told all of it; or refused it."""
    served = accounts.last_served(line)
    if line.status >= 400 and served.is_answered:
        return True
    ask, told = accounts.asks[line.id], served.told
    if told is None:
        return False
    # What Anthropic's first event tells is not all.
    return not (ask.path == MESSAGES and ask.is_stream and told.event == 1)


def test_each_call_has_the_usage_that_stands_in_its_answer(accounts: Accounts) -> None:
    looked_at: Counter[str] = Counter()
    for call_id, answer in accounts.answers.items():
        line, ask = accounts.lines[call_id], accounts.asks[call_id]
        if answer is None or not answer.is_good or line.is_estimated:
            continue
        # In a stream without usage: the mock provider's tokens are words.
        usage = answer.usage or (ask.words, answer.words)
        assert (line.input, line.output) == usage, (ask, line)
        looked_at[line.cached or "asked"] += 1
    assert min(looked_at[each] for each in ("asked", "hit", "join")) > 50


def test_usage_command_adds_up_the_usage_in_all_answers(accounts: Accounts) -> None:
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for call_id, line in accounts.lines.items():
        answer, ask = accounts.answers[call_id], accounts.asks[call_id]
        usage = line.input, line.output  # of an answer that is not whole, as far as it is known
        if answer is not None and answer.is_good and not line.is_estimated:
            usage = answer.usage or (ask.words, answer.words)
        if line.has_record:
            sums[line.model] += Counter(calls=1, input_tokens=usage[0], output_tokens=usage[1])
    assert {each["model"] for each in accounts.usage} == PRICES.keys()
    for each in accounts.usage:
        assert Counter({name: each[name] for name in sums["gpt"]}) == sums[each["model"]]


def test_cost_is_price_times_tokens_to_the_last_digit(accounts: Accounts) -> None:
    """Tokens in the answer, and those of attempts that were given up, as the ledger has them."""
    totals: defaultdict[str, Decimal] = defaultdict(Decimal)
    lost: defaultdict[str, Decimal] = defaultdict(Decimal)
    for line in accounts.lines.values():
        if not line.has_record:
            continue
        price_in, price_out, currency = PRICES[line.model]
        cost = (Decimal(price_in) * line.input + Decimal(price_out) * line.output) / 1_000_000
        if line.cached:
            cost = Decimal(0)
        assert line.currency == currency
        assert (line.cost > cost) == bool(_gave_up(accounts, line)), line
        assert line.cost >= cost
        lost[line.model] += line.cost - cost
        totals[line.model] += line.cost
    assert {each["model"]: each["cost"] for each in accounts.usage} == totals
    assert {each["model"]: each["currency"] for each in accounts.usage} == {
        model: currency for model, (_, _, currency) in PRICES.items()
    }
    for model, amount in lost.items():
        figures = [each for (_, name), each in accounts.reported.items() if name == model]
        assert amount == Decimal(PRICES[model][0]) * sum(each[2] for each in figures) / 1_000_000
        assert not any(each[3] for each in figures)
        assert bool(amount) == model.endswith("-flaky")


def _gave_up(accounts: Accounts, line: Line) -> int:
    """How many attempts of it had no answer at all, and another one was made: the provider may
    have worked on them, and their input is counted as lost."""
    several = accounts.served.get(line.id, ())
    return 0 if line.cached else sum(each.status is None for each in several[:-1])


def test_lost_tokens_are_the_input_of_each_attempt_that_was_given_up_once(
    accounts: Accounts,
) -> None:
    lost: Counter[tuple[str, str]] = Counter()
    for line in accounts.lines.values():
        if count := _gave_up(accounts, line):
            lost[line.team, line.model] += count * tokens_of(accounts.asks[line.id].body)
    counted = {key: lost_in for key, (_, _, lost_in, _) in accounts.reported.items() if lost_in}
    assert counted == lost
    assert sum(lost.values()) > 1000


def test_output_that_is_estimated_is_near_to_what_the_provider_had_written(
    accounts: Accounts,
) -> None:
    count = Vocabularies(0).local_count
    counted: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for line in accounts.lines.values():
        if not line.is_estimated:
            continue
        ask, served = accounts.asks[line.id], accounts.last_served(line)
        words = default_text(ask.text).split()
        if not ask.is_stream and line.outcome != "completed":  # of the one body a part, or nothing
            most = count(line.model, " ".join(words[:MAX_TOKENS])) + FRAMING
            assert line.output <= (1 + NEAR) * most, line
            continue
        counted[line.model] += line.output
        # The first event of Anthropic's says 1.
        told = served.told.output_tokens if served.told else 0
        written[line.model] += max(told, count(line.model, " ".join(words[: served.sent])))
    for model, tokens in written.items():
        assert abs(counted[model] - tokens) <= NEAR * tokens + FRAMING, (counted, written)
    assert min(written["gpt"], written["claude"]) > 500


def test_budgets_have_spent_what_the_ledger_has_and_nothing_is_left_reserved(
    accounts: Accounts,
) -> None:
    """Money of each call is rounded up to a billionth."""
    expected: Counter[tuple[str, str]] = Counter()
    for (team, _), (_, _, lost_in, lost_out) in accounts.reported.items():
        expected["tokens", team] += lost_in + lost_out
    for team, _, _, _, cached, _, _, _, tokens_in, tokens_out, _ in accounts.sums:
        if not cached:
            expected["tokens", team] += tokens_in + tokens_out
    for line in accounts.lines.values():
        dollars = DOLLARS_A_YUAN if line.currency == "CNY" else 1
        expected["usd", line.team] += ceil(line.cost * dollars * 10**9)
        expected["cny", line.team] += ceil(line.cost * dollars / DOLLARS_A_YUAN * 10**9)
    assert accounts.budgets == {key: (spent, 0) for key, spent in expected.items()}
    assert len(expected) == 3 * len(TEAMS)


def test_cost_in_the_head_of_an_answer_is_that_of_the_ledger(accounts: Accounts) -> None:
    seen = 0
    for call_id, line in accounts.lines.items():
        answer = accounts.answers[call_id]
        if answer is not None and answer.is_good and not accounts.asks[call_id].is_stream:
            cost = Decimal(answer.headers["x-sidecar-cost"])
            assert (cost, answer.headers["x-sidecar-currency"]) == (line.cost, line.currency)
            seen += 1
    assert seen > 1000
