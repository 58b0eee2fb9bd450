"""What the shipped `config.yaml` does for whoever tries it first: a hit, and the books."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.process import finished, serving

SHIPPED = Path(__file__).resolve().parent.parent / "config.yaml"
ASK: dict[str, Any] = {
    "model": "mock-gpt",
    "temperature": 0,
    "messages": [{"role": "user", "content": "How are you?"}],
}


def usage_of(events: str) -> dict[str, int]:
    """The last report of a stream, each field as it was said last."""
    told: dict[str, int] = {}
    for line in events.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or event.get("message", {}).get("usage") or {}
            told |= {name: count for name, count in usage.items() if isinstance(count, int)}
    return told


async def test_second_identical_call_is_a_hit_and_the_report_sums_the_usage_in_the_answers(
    tmp_path: Path,
) -> None:
    config = shutil.copy(SHIPPED, tmp_path)
    anywhere = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    expected = {name: [0, 0, 0] for name in ("mock-gpt", "mock-claude")}
    async with serving(Path(config), *anywhere) as sidecar, aiohttp.ClientSession() as session:

        async def ask(path: str, body: dict[str, Any]) -> tuple[str | None, str]:
            async with session.post(sidecar.url + path, json=body) as answer:
                assert answer.status == 200
                return answer.headers.get("x-sidecar-cache"), await answer.text()

        words = []
        for _ in range(2):
            word, text = await ask("/v1/chat/completions", ASK)
            words.append(word)
            usage = json.loads(text)["usage"]
            sums = expected["mock-gpt"]
            sums[0] += 1
            sums[1] += usage["prompt_tokens"]
            sums[2] += usage["completion_tokens"]
        assert words == ["miss", "hit"]
        asked = {"include_usage": True}
        _, text = await ask(
            "/v1/chat/completions", {**ASK, "seed": 1, "stream": True, "stream_options": asked}
        )
        usage = usage_of(text)
        sums[0] += 1
        sums[1] += usage["prompt_tokens"]
        sums[2] += usage["completion_tokens"]
        body = {**ASK, "model": "mock-claude", "max_tokens": 100, "stream": True}
        _, text = await ask("/v1/messages", body)
        usage = usage_of(text)
        expected["mock-claude"] = [1, usage["input_tokens"], usage["output_tokens"]]
        report = await finished(
            *("usage", "--config", config, "--by", "model", "--since", "1h", "--format", "json")
        )
    rows = {row["model"]: row for row in json.loads(report.out, parse_float=Decimal)}
    fields = ["model", "calls", "cached_calls", "input_tokens", "output_tokens", "cost", "currency"]
    assert [list(row) for row in rows.values()] == [fields] * 2
    assert {
        name: [row["calls"], row["input_tokens"], row["output_tokens"]]
        for name, row in rows.items()
    } == expected
    assert [rows[name]["cached_calls"] for name in ("mock-gpt", "mock-claude")] == [1, 0]
    assert all(row["cost"] > 0 and row["currency"] == "USD" for row in rows.values())
