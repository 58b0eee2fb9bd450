"""A sidecar that is killed while it writes: the cache on disk and the ledger lose the last moment
and nothing else, and nothing in them is torn."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import monotonic

import pytest

from tests.support.accounts import CHAT, EMBEDDINGS, MESSAGES, Answer, Ask, Lines, Provider, read
from tests.support.process import SidecarProcess, finished, serving

ROUNDS = 2
CALLS = 400
"""In each round before the kill."""
AT_ONCE = 12
ANSWERS_AFTER_MS = 15
"""With so many callers: some hundreds of calls a second, each with an answer to be kept."""
CACHE_LOSES_S = 0.1
LEDGER_LOSES_S = 0.2

CONFIG = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
log: {{access: {folder}/access.log}}
data_dir: state
upstreams:
  openai: {{dialect: openai, base_url: "http://{address}/v1"}}
  anthropic: {{dialect: anthropic, base_url: "http://{address}"}}
models: {{gpt: [openai], claude: [anthropic], embed: [openai]}}
filters:
  cache: {{backend: disk}}
chains:
  default:
    call: [request_id, ledger, token_counter, cache, retry]
    attempt: [timeout, sign]
"""


class Callers:
    """Callers of a sidecar, each of whom asks what nobody asked before."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.answered_at: dict[str, float] = {}
        """When all of an answer was there, by `time.monotonic`."""

    async def ask_until_killed(self, sidecar: SidecarProcess) -> float:
        """Ask on and on; after so many answers the sidecar is killed. Returns when."""
        lines = lines_to(sidecar.address)
        killed_at = 0.0
        answers = 0

        async def ask() -> None:
            nonlocal answers, killed_at
            while not killed_at:
                made = self._make()
                try:
                    async with lines.line() as line:
                        await line.begin(made, made.id)
                except OSError:
                    return
                if made.is_whole:
                    self.answered_at[made.id] = monotonic()
                answers += made.is_whole
                if answers >= CALLS and not killed_at:
                    sidecar.process.kill()
                    killed_at = monotonic()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(ask())
        lines.close()
        assert await sidecar.wait() == -9
        return killed_at

    def _make(self) -> Ask:
        number = len(self.asks)
        path, model = ((CHAT, "gpt"), (MESSAGES, "claude"), (EMBEDDINGS, "embed"))[number % 3]
        is_stream = path != EMBEDDINGS and number % 2 == 0
        ask = Ask(
            *(f"kill-{number}", "default", model, path),
            f"number {number}" + " word" * (number % 50),
            is_stream=is_stream,
            wants_usage=is_stream and path == CHAT,  # so that the request passes as it is
            temperature=0.0,
            headers={"x-mock-first-delay-ms": str(ANSWERS_AFTER_MS)},
        )
        self.asks.append(ask)
        return ask


def lines_to(address: str) -> Lines:
    host, _, port = address.rpartition(":")
    return Lines(host, int(port))


async def answers_to(asks: Iterable[Ask], address: str) -> dict[str, Answer]:
    """The same asked again, of whoever is at `address`."""
    lines = lines_to(address)
    waiting = iter([replace(ask, data=b"", is_whole=False) for ask in asks])
    found = {}

    async def ask() -> None:
        for each in waiting:
            async with lines.line() as line:
                await line.begin(each, each.id)
            answer = read(each)
            assert answer is not None
            assert answer.is_good, each
            found[each.id] = answer

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(ask())
    lines.close()
    return found


def ledger_rows(folder: Path) -> list[tuple[str, str, int, int, int]]:
    """Key, model, calls, input and output tokens: every caller has a key of its own, and so a
    record."""
    with closing(sqlite3.connect(folder / "state" / "ledger.db")) as ledger:
        ask = "SELECT key_id, model, calls, input_tokens, output_tokens FROM calls"
        return ledger.execute(ask).fetchall()


def key_of(call_id: str) -> str:
    """As the ledger names the key that is the call's id."""
    return sha256(call_id.encode()).hexdigest()[:16]


def is_sound(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as database:
        return bool(database.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


@pytest.mark.timeout(120)
async def test_killed_while_writing_it_loses_a_moment_and_serves_nothing_torn(
    tmp_path: Path,
) -> None:
    provider = Provider("")
    address = await provider.start()
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, address=address))
    callers = Callers()
    try:
        for _ in range(ROUNDS):
            begun = len(callers.asks)
            async with serving(config) as sidecar:
                killed_at = await callers.ask_until_killed(sidecar)
            asks = callers.asks[begun:]
            known = await answers_to([replace(ask, headers={}) for ask in asks], address)
            before_s = {
                ask.id: killed_at - callers.answered_at[ask.id]
                for ask in asks
                if ask.id in callers.answered_at
            }
            await check_ledger(tmp_path, config, known, before_s)
            await check_cache(tmp_path, config, asks, known, before_s)
    finally:
        await provider.stop()


async def check_ledger(
    folder: Path, config: Path, known: Mapping[str, Answer], before_s: Mapping[str, float]
) -> None:
    """Right after the kill: what `sidecar usage` says is what is there, and that is whole.

    `before_s` is how long before the kill a call's caller had all of the answer.
    """
    asked = ("--config", str(config), "--by", "model", "--format", "json")
    printed = await finished("usage", *asked)
    assert printed.code == 0, printed.err
    assert is_sound(folder / "state" / "ledger.db")
    rows = ledger_rows(folder)
    calls: Counter[str] = Counter()
    for _, model, count, *_ in rows:
        calls[model] += count
    assert {each["model"]: each["calls"] for each in json.loads(printed.out)} == calls
    usages = {key_of(call_id): known[call_id].usage for call_id in before_s}
    for key, _, count, *usage in rows:
        assert count == 1
        assert tuple(usage) == usages.get(key, tuple(usage))
    written = {key for key, *_ in rows}
    lost = [since_s for call_id, since_s in before_s.items() if key_of(call_id) not in written]
    assert max(lost, default=0.0) <= LEDGER_LOSES_S
    assert len(lost) < CALLS / 2


async def check_cache(
    folder: Path,
    config: Path,
    asks: Sequence[Ask],
    known: Mapping[str, Answer],
    before_s: Mapping[str, float],
) -> None:
    """After a restart: each answer is the provider's, and those that were kept are hits."""
    async with serving(config) as sidecar:
        again = await answers_to(asks, sidecar.address)
        assert await sidecar.end() == 0
        assert not [line for line in sidecar.log if line["level"] in ("warning", "error")]
    assert is_sound(folder / "state" / "cache.db")
    for call_id, answer in again.items():
        assert answer.body == known[call_id].body, call_id
    hits = {each for each in again if again[each].headers["x-sidecar-cache"] == "hit"}
    lost = [since_s for call_id, since_s in before_s.items() if call_id not in hits]
    assert max(lost, default=0.0) <= CACHE_LOSES_S
    assert len(lost) < CALLS / 2
    assert len(hits) > CALLS / 2
