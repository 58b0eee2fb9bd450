"""DashScope and Qianfan v1 through the sidecar: bytes, usage, models in paths, keys and errors."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.flow import HELLO, Answer, Flow, Start, chat_request, request, until

GENERATION = "/api/v1/services/aigc/text-generation/generation"
MULTIMODAL = "/api/v1/services/aigc/multimodal-generation/generation"
EMBEDDING = "/api/v1/services/embeddings/text-embedding/text-embedding"
PREFIX = "/rpc/2.0/ai_custom/v1/wenxinworkshop"
SSE = {"x-dashscope-sse": "enable", "accept": "text/event-stream"}
WORDS = 13  # of the mock's default answer

CONFIG = """
upstreams:
  qwen: {dialect: dashscope, base_url: "URL"}
  ernie: {dialect: qianfan, base_url: "URL"}
models:
  "qwen-*": [qwen]
  wise: [{upstream: qwen, model: qwen-max}]
  text-embedding-v4: [qwen]
  "*_pro": [ernie]
  bge_large_zh: [ernie]
  ernie-4.0: [{upstream: ernie, model: completions_pro}]
"""


@pytest.fixture
def snippet(tmp_path: Path) -> str:
    """Upstreams of both dialects at the provider that `start` has."""
    return CONFIG.replace("URL", f"unix:{tmp_path}/provider.sock")


@pytest.fixture
async def both(start: Start, snippet: str) -> Flow:
    return await start(snippet)


def ask_qwen(
    model: str = "qwen-max",
    *,
    path: str = GENERATION,
    given: Any = None,
    stream: bool = False,
    query: str = "",
    **headers: str,
) -> bytes:
    body = {"model": model, "input": given or {"messages": HELLO}, "parameters": {}}
    return _post(path + query, orjson.dumps(body), headers, SSE if stream else {})


def ask_ernie(
    model: str = "completions_pro",
    *,
    kind: str = "chat",
    body: Any = None,
    stream: bool = False,
    query: str = "",
    **headers: str,
) -> bytes:
    body = body or {"messages": HELLO, "stream": stream}
    return _post(f"{PREFIX}/{kind}/{model}{query}", orjson.dumps(body), headers, {})


def _post(path: str, body: bytes, headers: dict[str, str], more: dict[str, str]) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request("POST", path, body, named | more)


ASK = {"qwen": ask_qwen, "ernie": ask_ernie}
MODELS = {"qwen": "qwen-max", "ernie": "completions_pro"}


def error_of(name: str, answer: Answer) -> tuple[Any, str, Any]:
    """Code, message and id in the envelope of the dialect, which holds nothing else of note."""
    if name == "qwen":
        assert answer.json.keys() == {"code", "message", "request_id"}
        return answer.json["code"], answer.json["message"], answer.json["request_id"]
    assert answer.json.keys() == {"error_code", "error_msg", "id", "code"}
    return answer.json["error_code"], answer.json["error_msg"], answer.json["id"]


@pytest.fixture(params=["qwen", "ernie"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Bytes and usage


@pytest.mark.parametrize("split", ["1", "7", "1000"])
@pytest.mark.parametrize("stream", [False, True])
async def test_bytes_pass_as_they_came_and_usage_is_what_was_told(
    both: Flow, name: str, stream: bool, split: str
) -> None:
    whole = await both.call(ASK[name](stream=stream))
    cut = await both.call(ASK[name](stream=stream, x_mock_split=split))
    assert whole.is_whole
    assert cut.is_whole
    assert whole.body == cut.body
    assert (whole.header("content-type") or "").startswith(
        "text/event-stream" if stream else "application/json"
    )
    book = both.provider.books.of(MODELS[name])
    assert (book.told_input_tokens, book.told_output_tokens) == (2 * 2, 2 * WORDS)
    for line in await both.logged(2):
        assert (line["input_tokens"], line["output_tokens"]) == (2, WORDS)
        assert line["upstream"] == name


async def test_usage_is_the_wrong_one_when_the_provider_says_so(both: Flow, name: str) -> None:
    await both.call(ASK[name](stream=True, x_mock_usage="wrong"))
    (line,) = await both.logged()
    assert (line["input_tokens"], line["output_tokens"]) == (27, WORDS * 10 + 7)


async def test_other_endpoints_are_counted_too(both: Flow) -> None:
    parts = [{"role": "user", "content": [{"text": "hello there"}, {"image": "http://a/b.png"}]}]
    texts = {"texts": ["one two three"]}
    calls = [
        ask_qwen("qwen-vl-max", path=MULTIMODAL, given={"messages": parts}, stream=True),
        ask_qwen("text-embedding-v4", path=EMBEDDING, given=texts),
        ask_ernie("sqlcoder_pro", kind="completions", body={"prompt": "hello there"}),
        ask_ernie("bge_large_zh", kind="embeddings", body={"input": ["one two three"]}),
    ]
    for call in calls:
        assert (await both.call(call)).status == 200
    lines = await both.logged(4)
    assert [(each["endpoint"], each["input_tokens"], each["output_tokens"]) for each in lines] == [
        ("multimodal_generation", 2, WORDS),
        ("embeddings", 3, 0),
        ("completions", 2, WORDS),
        ("embeddings", 3, 0),
    ]


async def test_client_that_leaves_is_charged_what_its_last_frame_said(
    both: Flow, name: str
) -> None:
    client = await both.connect()
    client.send(ASK[name](stream=True, x_mock_hang="events:4"))
    mark = b'"output_tokens":4' if name == "qwen" else b'"completion_tokens":4'
    await client.until(mark)
    client.leave()
    (line,) = await both.logged()
    assert line["outcome"] == "client_gone"
    assert (line["input_tokens"], line["output_tokens"]) == (2, 4)
    await until(lambda: both.provider.books.of(MODELS[name]).aborted_streams == 1)
    assert both.provider.books.of(MODELS[name]).told_output_tokens == 4


async def test_embedded_provider_speaks_both(start: Start, name: str) -> None:
    flow = await start(CONFIG.replace("URL", "mock:"))
    for stream in (False, True):
        answer = await flow.call(ASK[name](stream=stream))
        assert answer.is_whole
        assert b"dozen plain words" in answer.body.replace(b"\n", b"") or stream
    for line in await flow.logged(2):
        assert (line["input_tokens"], line["output_tokens"]) == (2, WORDS)


# Which model, and where it is named


async def test_targets_own_name_stands_where_the_dialect_names_models(both: Flow) -> None:
    asked = {"messages": HELLO, "temperature": 0.5, "user_id": "u"}
    for call in (ask_qwen("wise"), ask_ernie("ernie-4.0", body=asked)):
        assert (await both.call(call)).status == 200
    sent_qwen, sent_ernie = both.provider.books.requests
    assert sent_qwen.path == GENERATION
    assert orjson.loads(sent_qwen.body)["model"] == "qwen-max"
    assert sent_ernie.path == f"{PREFIX}/chat/completions_pro"
    assert sent_ernie.body == orjson.dumps(asked)  # not a byte of it names the model
    lines = await both.logged(2)
    assert [line["model"] for line in lines] == ["wise", "ernie-4.0"]


@pytest.mark.parametrize("with_prefix", [False, True])
async def test_base_url_may_have_the_protocols_own_path(
    start: Start, snippet: str, name: str, with_prefix: bool
) -> None:
    if with_prefix:
        for dialect, own in (("dashscope", "/api/v1"), ("qianfan", PREFIX)):
            head, tail = snippet.split(f"{dialect}, base_url: ", 1)
            tail = tail.replace("provider.sock", f"provider.sock:{own}", 1)
            snippet = f"{head}{dialect}, base_url: {tail}"
    flow = await start(snippet)
    assert (await flow.call(ASK[name]())).status == 200
    assert flow.provider.books.of(MODELS[name]).completed_calls == 1


async def test_model_of_another_dialect_is_refused_with_the_paths_to_call(both: Flow) -> None:
    for model, path in (("qwen-max", GENERATION), ("x_pro", f"{PREFIX}/chat/{{model}}")):
        answer = await both.call(chat_request(model))
        assert (answer.status, answer.error["code"]) == (400, "wrong_dialect")
        assert path in answer.error["message"]
    for answer in (await both.call(ask_qwen("gpt")), await both.call(ask_ernie("claude"))):
        assert answer.status == 400
        assert answer.header("x-sidecar-error") == "wrong_dialect"
    assert not both.provider.books.requests


async def test_upstreams_are_reached_directly_too(both: Flow) -> None:
    body = orjson.dumps({"model": "qwen-max", "input": {"messages": HELLO}})
    for path in (f"/qwen{GENERATION}", f"/ernie{PREFIX}/chat/eb-instant"):
        assert (await both.call(request("POST", path, body))).is_whole
        assert both.provider.books.requests[-1].path == path[path.index("/", 1) :]
    answer = await both.call(request("GET", "/qwen/api/v1/tasks/t-1?x=1"))
    assert (answer.json["path"], answer.json["query"]) == ("/api/v1/tasks/t-1", "x=1")


# Credentials


TOKEN = "24.canary.2592000"
TEAM = f"team: readers\nkeys: ['sha256:{sha256(b'team-canary').hexdigest()}']\n"


async def test_clients_token_never_reaches_an_upstream(both: Flow, name: str) -> None:
    for query, kept in (
        (f"?access_token={TOKEN}", ""),
        (f"?a=1&access_token={TOKEN}&b=%20", "a=1&b=%20"),
        (f"?access%5Ftoken={TOKEN}&c", "c"),
        (f"?access_token={TOKEN}&access_token={TOKEN}", ""),
        ("?a=%41&access_tokens=1", "a=%41&access_tokens=1"),
    ):
        answer = await both.call(ASK[name](query=query, authorization="Bearer sk-canary"))
        assert answer.status == 200
        sent = both.provider.books.requests[-1]
        assert sent.query == kept
        assert "canary" not in f"{sent.query}{sent.headers}"
    direct = request("POST", f"/{name}/x?access_token={TOKEN}", b"{}")
    assert (await both.call(direct)).json["query"] == ""
    assert "canary" not in both.log_path.read_text()


async def test_clients_token_is_passed_on_where_that_is_wanted_unless_it_is_a_teams(
    start: Start, snippet: str
) -> None:
    snippet = snippet.replace('sock"}\nmodels', 'sock", pass_client_key: true}\nmodels')
    flow = await start(f"{snippet}teams: t.yaml", files={"t.yaml": TEAM})
    ours = "team%2Dcanary"
    for token, kept in ((TOKEN, f"access_token={TOKEN}"), ("team-canary", ""), (ours, "")):
        await flow.call(ask_ernie(query=f"?access_token={token}", x_api_key="team-canary"))
        sent = flow.provider.books.requests[-1]
        assert sent.query == kept
        assert "team-canary" not in f"{sent.query}{sent.headers}"


# Errors


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_model_is_refused_in_the_dialects_envelope(
    both: Flow, name: str, stream: bool
) -> None:
    answer = await both.call(ASK[name]("gone", stream=stream))
    assert answer.status == 404
    code, message, call_id = error_of(name, answer)
    assert code == ("ModelNotFound.model_not_found" if name == "qwen" else 336005)
    assert '"gone"' in message
    assert call_id.startswith("call_")
    assert not both.provider.books.requests


async def test_model_in_the_path_that_a_team_may_not_use_is_refused(
    start: Start, snippet: str
) -> None:
    team = f"{TEAM}models: [bge_large_zh]\n"
    flow = await start(f"{snippet}teams: t.yaml", files={"t.yaml": team})

    async def ask(model: str) -> Answer:
        body = {"input": ["a"]}
        call = ask_ernie(model, kind="embeddings", body=body, x_api_key="team-canary")
        return await flow.call(call)

    assert (await ask("bge_large_zh")).status == 200
    for model in ("completions_pro", "bge_large_zh;x", "bge_large_zh%2f..%2fcompletions_pro"):
        answer = await ask(model)
        assert answer.status in (400, 404)
        error_of("ernie", answer)
    assert len(flow.provider.books.requests) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", GENERATION, 405, "qwen"),
        ("GET", f"{PREFIX}/chat/x_pro", 405, "ernie"),
        ("GET", "/api/v1/tasks/abc", 404, "qwen"),
        ("POST", "/api/v1/services/aigc/image", 404, "qwen"),
        ("POST", f"{PREFIX}/text2image/sd_xl", 404, "ernie"),
        ("POST", f"{PREFIX}/chat/", 404, "ernie"),
        ("POST", f"{PREFIX}/chat/%2e%2e", 400, "ernie"),
    ],
)
async def test_what_is_not_served_is_refused_in_the_dialects_envelope(
    both: Flow, method: str, path: str, status: int, name: str
) -> None:
    answer = await both.call(request(method, path, b"{}" if method == "POST" else b""))
    assert answer.status == status
    error_of(name, answer)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model":"a","model":"b"}', b'{"model":5}'])
async def test_body_that_cannot_be_routed_is_refused(both: Flow, name: str, body: bytes) -> None:
    path = GENERATION if name == "qwen" else f"{PREFIX}/chat/completions_pro"
    answer = await both.call(request("POST", path, body))
    if name == "ernie" and body == b'{"model":5}':  # no field that means anything there
        assert answer.json["error_code"] == 336003
        assert both.provider.books.requests
        return
    assert answer.status == 400
    error_of(name, answer)
    assert not both.provider.books.requests


async def test_stream_that_breaks_off_ends_with_an_error_of_the_dialect(
    both: Flow, name: str
) -> None:
    answer = await both.call(ASK[name](stream=True, x_mock_die="events:3"))
    assert not answer.is_whole
    *frames, last = answer.body.decode().removesuffix("\n\n").split("\n\n")
    assert len(frames) == 3
    if name == "qwen":
        assert last.startswith("event:error\n:HTTP_STATUS/502\nstatus:502\ndata:{")
        error = orjson.loads(last.partition("data:")[2])
        assert error["code"].startswith("InternalError.upstream_")
    else:
        error = orjson.loads(last.removeprefix("data: "))
        assert (error["error_code"], error["code"][:9]) == (2, "upstream_")
    (line,) = await both.logged()
    assert line["outcome"] == "upstream_failed"
    assert (line["input_tokens"], line["output_tokens"]) == (2, 3)


async def test_providers_own_errors_pass_as_they_came(both: Flow) -> None:
    answer = await both.call(ask_qwen(stream=True, x_mock_status="429"))
    assert (answer.status, answer.json["code"]) == (429, "Throttling.RateQuota")
    answer = await both.call(ask_ernie(stream=True, x_mock_status="429"))
    assert (answer.status, answer.json["error_code"]) == (200, 18)
    assert "input_tokens" not in (await both.logged(2))[0]


async def test_first_event_that_is_an_error_counts_as_no_answer_where_events_are_waited_for(
    start: Start, snippet: str, name: str
) -> None:
    flow = await start(snippet.replace('sock"}', 'sock", wait_for: event}'))
    answer = await flow.call(ASK[name](stream=True, x_mock_error_event="0"))
    assert answer.status == 502
    assert answer.header("x-sidecar-error") == "upstream_error_event"
    code, message, _ = error_of(name, answer)
    assert code == ("InternalError.upstream_error_event" if name == "qwen" else 2)
    assert ("InternalError" if name == "qwen" else "336000") in message
    assert (await flow.call(ASK[name](stream=True))).is_whole


async def test_limit_of_ours_is_told_in_the_providers_words(
    start: Start, snippet: str, name: str
) -> None:
    limit = "filters: {rate_limit: {requests_per_minute: 1}}"
    flow = await start(f"{snippet}\n{limit}")
    first, second = [await flow.call(ASK[name]()) for _ in range(2)]
    assert (first.status, second.status) == (200, 429)
    assert second.header("x-ratelimit-remaining-requests") == "0"
    code, *_ = error_of(name, second)
    assert str(code).startswith("Throttling." if name == "qwen" else "18")
