"""Questions that mean the same share an answer over real sockets, with the provider's embeddings.

The provider's vectors depend on the text alone and have no meaning: two texts are a little alike by
chance. The tests choose wordings that are, and set the threshold accordingly.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import orjson
import pytest

from sidecar.mock.content import unit_vector
from tests.support.flow import CHAT, MESSAGES, PROVIDER_KEY, Answer, Flow, Start, request, until

THRESHOLD = 0.8
DIMENSIONS = 8

CONFIG = f"""
models:
  gpt: [up-openai]
  claude: [up-anthropic]
  embed: [{{upstream: up-openai, model: text-embedding-3-small}}]
chains:
  default:
    call: [request_id, metrics, access_log, token_counter, semantic_cache, priority_queue, retry]
    attempt: [circuit_breaker, sign]
filters:
  semantic_cache: {{embedding_model: embed, threshold: {THRESHOLD}, timeout_s: 5.0}}
  retry: {{max_attempts: 1}}
"""
PRICES = """
  cost:
    prices:
      gpt: {input: 1000000, output: 1000000}
      text-embedding-3-small: {input: 1000, output: 0}
"""
BEHIND_CACHE = CONFIG.replace("semantic_cache,", "cache, semantic_cache,")
VECTORS = "text-embedding-3-small"
SLOW = f"- {{match: {{model: {VECTORS}}}, hang: head}}"

FIRST = "How do I get to the station?"


def likeness(one: str, other: str) -> float:
    """The cosine of the provider's vectors for two texts."""
    pair = [unit_vector(orjson.dumps(text), DIMENSIONS) for text in (one, other)]
    return sum(a * b for a, b in zip(*pair, strict=True))


def wording(*, alike: bool) -> str:
    """Another text whose vector is, or is not, like that of `FIRST`."""
    texts = (f"{FIRST} Hm{'m' * number}." for number in count())
    return next(text for text in texts if alike == (likeness(FIRST, text) > THRESHOLD))


ALIKE, OTHER = wording(alike=True), wording(alike=False)


def asking(text: str, *, model: str = "gpt", stream: bool = False, **headers: str) -> bytes:
    body = {
        "model": model,
        "max_tokens": 50,
        "temperature": 0,
        "stream": stream,
        "messages": [{"role": "user", "content": text}],
    }
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    path = MESSAGES if model == "claude" else CHAT
    return request("POST", path, orjson.dumps(body), named)


def word(answer: Answer) -> str | None:
    return answer.header("x-sidecar-cache")


def calls(flow: Flow, model: str) -> int:
    return flow.provider.books.of(model).calls


async def logged(flow: Flow, number: int) -> dict[str, Any]:
    return (await flow.logged(number))[number - 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["gpt", "claude"])
async def test_other_wording_is_answered_without_asking_again(
    start: Start, model: str, stream: bool
) -> None:
    flow = await start(CONFIG)
    first = await flow.call(asking(FIRST, model=model, stream=stream))
    second = await flow.call(asking(ALIKE, model=model, stream=stream))
    third = await flow.call(asking(OTHER, model=model, stream=stream))
    assert [word(each) for each in (first, second, third)] == ["miss", "hit", "miss"]
    assert second.body == first.body
    assert second.header("content-type") == first.header("content-type")
    assert second.header("x-sidecar-cache-similarity") == f"{likeness(FIRST, ALIKE):.3f}"
    assert (calls(flow, model), calls(flow, VECTORS)) == (2, 3)
    line = await logged(flow, 2)
    assert (line["cached"], line["attempts"]) == ("hit", 0)


async def test_recorded_stream_answers_a_call_for_a_whole_answer(start: Start) -> None:
    flow = await start(CONFIG)
    await flow.call(asking(FIRST, stream=True))
    answer = await flow.call(asking(ALIKE))
    assert (word(answer), answer.header("content-type")) == ("hit", "application/json")
    assert answer.json["choices"][0]["message"]["content"]


async def test_exact_hit_asks_for_no_embedding(start: Start) -> None:
    flow = await start(BEHIND_CACHE)
    words = [word(await flow.call(asking(FIRST))) for _ in range(3)]
    assert words == ["miss", "hit", "hit"]
    assert (calls(flow, "gpt"), calls(flow, VECTORS)) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_other_wording_behind_the_exact_cache_is_a_hit_that_costs_its_embedding(
    start: Start, stream: bool
) -> None:
    flow = await start(BEHIND_CACHE.replace("access_log,", "access_log, cost,") + PRICES)
    first = await flow.call(asking(FIRST, stream=stream))
    again = [await flow.call(asking(ALIKE, stream=stream)) for _ in range(2)]
    assert [word(each) for each in (first, *again)] == ["miss", "hit", "hit"]
    assert {each.body for each in again} == {first.body}
    for each in again:  # it is not kept a second time, to live longer than it may
        assert each.header("x-sidecar-cache-similarity") == f"{likeness(FIRST, ALIKE):.3f}"
    assert (calls(flow, "gpt"), calls(flow, VECTORS)) == (1, 3)
    lines = await flow.logged(3)
    assert [(line.get("cached"), line["attempts"]) for line in lines] == [
        (None, 1),
        ("hit", 0),
        ("hit", 0),
    ]
    assert len({line["output_tokens"] for line in lines}) == 1
    words = [len(text.split()) for text in (FIRST, ALIKE, ALIKE)]  # the provider's tokens
    costs = [float(line["cost"]) for line in lines]
    assert costs[0] > 1
    assert costs[1:] == [pytest.approx(number / 1000) for number in words[1:]]


async def test_upstream_s_own_key_signs_the_embedding(start: Start) -> None:
    key = "{sign: {scheme: bearer, key: env:PROVIDER_KEY}}"
    flow = await start(f"{CONFIG}\nupstreams: {{up-openai: {key}}}")
    await flow.call(asking(FIRST, authorization="Bearer client-key"))
    sent = [each for each in flow.provider.books.requests if each.path == "/v1/embeddings"]
    assert len(sent) == 1
    assert sent[0].header("authorization") == f"Bearer {PROVIDER_KEY}"


@pytest.mark.parametrize("setting", ["status: 500", "status: 429", "die: head", "die: 'events:1'"])
async def test_call_goes_on_when_the_embedding_fails(start: Start, setting: str) -> None:
    flow = await start(CONFIG, script=f"- {{match: {{model: {VECTORS}}}, {setting}}}")
    for _ in range(2):
        answer = await flow.call(asking(FIRST))
        assert (answer.status, answer.is_whole) == (200, True)
    assert calls(flow, "gpt") == 2


async def test_call_goes_on_when_the_embedding_is_late(start: Start) -> None:
    flow = await start(CONFIG.replace("timeout_s: 5.0", "timeout_s: 0.05"), script=SLOW)
    answer = await flow.call(asking(FIRST))
    assert (answer.status, answer.is_whole) == (200, True)
    await flow.quiet()
    assert flow.provider.books.of(VECTORS).aborted_calls == 1


async def test_client_that_leaves_ends_the_embedding_at_once(start: Start) -> None:
    flow = await start(CONFIG, script=SLOW)
    client = await flow.connect()
    client.send(asking(FIRST))
    await until(lambda: flow.provider.open_requests == 1)
    client.leave()
    await flow.quiet()
    assert (calls(flow, "gpt"), calls(flow, VECTORS)) == (0, 1)
    assert (await logged(flow, 1))["outcome"] == "client_gone"
