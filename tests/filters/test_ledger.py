"""Records of all calls that somebody was asked for, or a cache answered; of no others."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest

from filters.ledger import MAX_MODEL, Ledger
from filters.stores.disk_ledger import NAME
from filters.stores.ledger import GATHER_S
from filters.stores.redis import Script
from filters.token_counter import TokenCounter
from sidecar.api import (
    CACHED,
    COST,
    LOST_USAGE,
    REPORTED,
    SIDE_CALLS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Cost,
    End,
    Filter,
    Key,
    Outcome,
    Rejected,
    Reply,
    Secret,
    SideCall,
    StoreAddress,
    Target,
    Usage,
)
from sidecar.chain import check_order
from tests.support.harness import MODEL, FakeUpstream, Harness, Use
from tests.support.valkey import Valkey

NOTHING = Script("return 0")

ANSWER = orjson.dumps({"usage": {"prompt_tokens": 10, "completion_tokens": 12}})


class Finds(CallFilter):
    """Leaves facts at the call's end, as filters inside of the ledger do."""

    facts: ClassVar[dict[Key[Any], Any]] = {}

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        def leave(end: End) -> None:
            for key, value in self.facts.items():
                call[key] = value

        call.on_end(leave)
        return call_next(call)


def finds(facts: dict[Key[Any], Any]) -> type[Filter]:
    return type("FindsThese", (Finds,), {"facts": facts})


class Answers(CallFilter):
    """Answers without an upstream, as a cache does."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        return Reply.of(200, ANSWER)


class Refuses(CallFilter):
    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise Rejected(429, "rate_limited", "too many")


def harness(folder: Path, *inner: type[Filter], **settings: Any) -> Harness:
    found = Harness(Use(Ledger, settings), *inner, TokenCounter, data_dir=folder)
    found.upstream.answer = found.upstream.whole(ANSWER)
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    connection = sqlite3.connect(folder / NAME)
    connection.row_factory = sqlite3.Row
    found = [dict(row) for row in connection.execute("SELECT * FROM calls ORDER BY rowid")]
    connection.close()
    return found


def shown(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


async def test_a_call_leaves_a_record_of_who_asked_whom_and_what_it_took(tmp_path: Path) -> None:
    cost = Cost(Decimal("0.0000087"), "USD")
    async with harness(tmp_path, finds({COST: cost})) as desk:
        call = desk.call(headers=[("authorization", "Bearer sk-secret")])
        await desk.run(call)
        key_id, ended_ms = call.key_id, desk.clock.wall() * 1000
    (row,) = rows(tmp_path)
    assert row == {
        "time_ms": ended_ms,
        "team": "tests",
        "key_id": key_id,
        "endpoint": "chat_completions",
        "model": MODEL,
        "upstream": "fake",
        "upstream_model": MODEL,
        "status": 200,
        "outcome": "completed",
        "cached": "",
        "is_side": 0,
        "is_estimated": 0,
        "currency": "USD",
        "calls": 1,
        "input_tokens": 10,
        "output_tokens": 12,
        "cached_tokens": 0,
        "cache_write_tokens": 0,
        "cache_write_1h_tokens": 0,
        "reasoning_tokens": 0,
        "reported_input_tokens": 10,
        "reported_output_tokens": 12,
        "lost_input_tokens": 0,
        "lost_output_tokens": 0,
        "attempts": 1,
        "total_ms": 0,
        "cost": "0.0000087",
    }
    assert "sk-secret" not in (tmp_path / NAME).read_bytes().decode("latin-1")


async def test_calls_of_one_kind_are_one_record(tmp_path: Path) -> None:
    cost = Cost(Decimal("0.0000087"), "USD")
    async with harness(tmp_path, finds({COST: cost})) as desk:
        for key in ("one", "two", "one", "one"):
            await desk.run(desk.call(headers=[("authorization", f"Bearer sk-{key}")]))
    one, two = rows(tmp_path)
    assert one["key_id"] != two["key_id"]
    names = ("calls", "input_tokens", "output_tokens", "reported_input_tokens", "attempts", "cost")
    assert shown(one, *names) == (3, 30, 36, 30, 3, "0.0000261")
    assert shown(two, *names) == (1, 10, 12, 10, 1, "0.0000087")


async def test_a_stream_is_recorded_at_its_end_with_its_whole_time(tmp_path: Path) -> None:
    async with harness(tmp_path) as desk:
        desk.upstream.answer = desk.upstream.stream(b'data: {"choices": []}\n\n')
        run = desk.start()
        await run.begun()
        desk.clock.turn(GATHER_S)
        await desk.settled()
        assert rows(tmp_path) == []
        desk.clock.turn(1.5)
        desk.upstream.source.finish(b"data: " + ANSWER + b"\n\n")
        await run.ended()
        desk.clock.turn(GATHER_S)
        await desk.settled()
        (row,) = rows(tmp_path)
    assert shown(row, "output_tokens", "total_ms") == (12, 1600)


async def test_unknown_cost_is_unknown_and_not_zero(tmp_path: Path) -> None:
    async with harness(tmp_path) as desk:
        await desk.run()
    assert shown(rows(tmp_path)[0], "cost", "currency") == (None, None)


@pytest.mark.parametrize("how", ["hit", "join"])
async def test_a_call_that_a_cache_answered_is_recorded_as_such(tmp_path: Path, how: str) -> None:
    facts = {CACHED: how, USAGE: Usage(10, 12), COST: Cost(Decimal(0), "USD")}
    async with harness(tmp_path, finds(facts), Answers) as desk:
        await desk.run()
    (row,) = rows(tmp_path)
    assert shown(row, "cached", "attempts", "input_tokens", "cost") == (how, 0, 10, "0")
    # No provider reported anything for this call.
    assert shown(row, "reported_input_tokens", "reported_output_tokens") == (0, 0)


async def test_what_was_counted_here_is_told_from_what_was_reported(tmp_path: Path) -> None:
    facts = {
        USAGE: Usage(10, 7, is_estimated=True),
        REPORTED: Usage(10, 1),
        LOST_USAGE: Usage(30, 2),
    }
    async with harness(tmp_path, finds(facts)) as desk:
        await desk.run()
    (row,) = rows(tmp_path)
    assert shown(row, "is_estimated", "output_tokens", "reported_output_tokens") == (1, 7, 1)
    assert shown(row, "lost_input_tokens", "lost_output_tokens") == (30, 2)


async def test_side_calls_have_records_that_cost_nothing_again(tmp_path: Path) -> None:
    target = Target(FakeUpstream("embedder"), "embed-small")
    side = SideCall(target, "embeddings", Usage(6, 0))
    facts = {SIDE_CALLS: [side], COST: Cost(Decimal("0.5"), "CNY"), CACHED: "hit"}
    async with harness(tmp_path, finds(facts), Answers) as desk:
        await desk.run()
    main, extra = rows(tmp_path)
    assert shown(main, "is_side", "cost", "currency", "cached") == (0, "0.5", "CNY", "hit")
    assert shown(extra, "is_side", "cost", "currency", "cached") == (1, "0", "CNY", "")
    assert shown(extra, "endpoint", "model", "upstream", "upstream_model") == (
        *("embeddings", "embed-small", "embedder", "embed-small"),
    )
    assert shown(extra, "input_tokens", "reported_input_tokens", "team") == (6, 6, "tests")
    assert shown(extra, "calls", "attempts", "total_ms", "lost_input_tokens") == (1, 0, 0, 0)


async def test_a_refused_call_that_others_were_made_for_has_a_record_with_their_cost(
    tmp_path: Path,
) -> None:
    side = SideCall(Target(FakeUpstream("embedder"), "embed-small"), "embeddings", Usage(6, 0))
    facts = {SIDE_CALLS: [side], COST: Cost(Decimal("0.02"), "USD")}
    async with harness(tmp_path, finds(facts), Refuses) as desk:
        await desk.run()
    main, extra = rows(tmp_path)
    assert shown(main, "status", "attempts", "cost") == (429, 0, "0.02")
    assert shown(extra, "is_side", "input_tokens", "cost") == (1, 6, "0")


async def test_calls_that_nobody_was_asked_for_have_no_record(tmp_path: Path) -> None:
    async with harness(tmp_path, Refuses) as desk:
        await desk.run()
        await desk.run(desk.call(refusal=Rejected(401, "invalid_key", "who are you?")))
    async with harness(tmp_path) as desk:
        await desk.run(desk.call(b"", method="GET", path="/v1/models"))
        await desk.run(desk.call(b"{}", path="/fake/files"))
    assert rows(tmp_path) == []


async def test_a_failed_call_is_recorded_with_its_end(tmp_path: Path) -> None:
    async with harness(tmp_path) as desk:
        desk.upstream.answer = desk.upstream.failing()
        await desk.run()
        desk.upstream.asked.clear()
        desk.upstream.answer = desk.upstream.silent()
        run = desk.start()
        await desk.upstream.asked.wait()
        run.client_leaves()
        await run.ended()
    failed, gone = rows(tmp_path)
    assert shown(failed, "status", "outcome", "output_tokens") == (502, "upstream_failed", 0)
    assert shown(gone, "outcome", "attempts") == ("client_gone", 1)


async def test_a_caller_s_model_is_cut(tmp_path: Path) -> None:
    async with harness(tmp_path) as desk:
        await desk.run(desk.call({"model": "m" * 300, "messages": []}))
    assert rows(tmp_path)[0]["model"] == "m" * MAX_MODEL


async def test_the_upstream_s_name_of_the_model_is_kept_beside_the_caller_s(tmp_path: Path) -> None:
    async with harness(tmp_path) as desk:
        call = desk.call()
        call.targets = (Target(desk.upstream, "gpt-4o-mini-2024-07-18"),)
        await desk.run(call)
    names = shown(rows(tmp_path)[0], "model", "upstream_model")
    assert names == (MODEL, "gpt-4o-mini-2024-07-18")


async def test_a_call_is_not_held_by_its_record(tmp_path: Path) -> None:
    async with harness(tmp_path) as desk:
        call = desk.call()
        await desk.run(call)
        (kind,) = desk.filters[0]._book._open  # type: ignore[attr-defined]
        assert {type(each) for each in kind} == {str, int, bool, type(None), Outcome}


async def test_teams_share_one_file(tmp_path: Path) -> None:
    async with harness(tmp_path, Ledger) as desk:
        await desk.run()
        assert [len(desk.resources.of_kind(each)) for each in ("sqlite", "ledger")] == [1, 1]
    (row,) = rows(tmp_path)  # both are of the same team
    assert row["calls"] == 2


# Where


@pytest.mark.parametrize("settings", [{"where": "off"}, {"where": "auto"}])
def test_without_a_place_calls_go_past_it(settings: dict[str, Any]) -> None:
    (found,) = Harness(Use(Ledger, settings)).filters
    assert found.is_idle


def test_a_place_that_is_not_there_is_refused_at_load() -> None:
    with pytest.raises(ValueError, match="needs a `data_dir`"):
        Harness(Use(Ledger, {"where": "disk"}))
    with pytest.raises(ValueError, match="needs a `store"):
        Harness(Use(Ledger, {"where": "redis"}))


async def test_stop_works_without_a_start_and_twice(tmp_path: Path) -> None:
    (found,) = Harness(Ledger, data_dir=tmp_path).filters
    await found.stop()
    await found.stop()
    assert not (tmp_path / NAME).exists()


async def test_with_a_shared_store_nothing_is_written_to_disk(tmp_path: Path) -> None:
    with Valkey() as server:
        store = StoreAddress(Secret(server.url))
        desk = Harness(Ledger, TokenCounter, data_dir=tmp_path, store=store)
        desk.upstream.answer = desk.upstream.whole(ANSWER)
        async with desk:
            book = desk.filters[0]._book  # type: ignore[attr-defined]
            await book._writer._redis.run(NOTHING, [])
            await desk.run()
        minute = int(desk.clock.wall()) // 60
        assert b"calls" not in server.command("HGETALL", f"sidecar:ledger:{minute}")
        assert server.command("HLEN", f"sidecar:ledger:{minute}") == b":5\r\n"
    assert not (tmp_path / NAME).exists()


def test_a_chain_without_token_counts_does_not_load() -> None:
    (mistake,) = check_order([Ledger], [])
    assert "usage" in mistake.message
    assert check_order([Ledger, TokenCounter], []) == []
