"""Who may call what: keys, models, upstreams, and what of the client's is kept from providers."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.support.flow import (
    CHAT,
    MESSAGES,
    PROVIDER_KEY,
    Answer,
    Flow,
    Start,
    chat_body,
    chat_request,
    request,
)

SEARCH_KEY, SHOP_KEY, ENV_KEY = "sk-search-client", "sk-shop-client", "sk-env-client"
CONFIG = """
teams: teams/*.yaml
upstreams:
  up-openai: {sign: {scheme: bearer, key: "env:PROVIDER_KEY"}}
  up-anthropic: {sign: {scheme: header, name: x-api-key, key: "env:PROVIDER_KEY"}}
models:
  gpt: [up-openai]
  gpt-mini: [up-openai]
  "qwen-*": [up-openai]
  claude: [up-anthropic]
filters: {request_id: {header: x-request-id}}
"""
TEAMS = {
    "teams/search.yaml": f"""
team: search
keys: ["sha256:{hashlib.sha256(SEARCH_KEY.encode()).hexdigest()}", "env:SEARCH_KEY"]
models: [gpt, "qwen-?"]
""",
    "teams/shop.yaml": """
team: shop
keys: ["file:shop.key"]
upstreams: [up-openai]
filters: {request_id: {header: x-shop-id}}
""",
    "teams/shop.key": SHOP_KEY + "\n",
}


@pytest.fixture
async def flow(start: Start) -> Flow:
    return await start(CONFIG, files=TEAMS, environ={"SEARCH_KEY": ENV_KEY})


def keyed(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def chat(flow: Flow, key: str, model: str = "gpt") -> Answer:
    path = MESSAGES if model == "claude" else CHAT
    return await flow.call(request("POST", path, chat_body(model), keyed(key)))


@pytest.mark.parametrize(
    ("key", "team"), [(SEARCH_KEY, "search"), (ENV_KEY, "search"), (SHOP_KEY, "shop")]
)
async def test_a_team_is_known_by_any_kind_of_key(flow: Flow, key: str, team: str) -> None:
    assert (await chat(flow, key)).status == 200
    (line,) = await flow.logged()
    assert line["team"] == team


@pytest.mark.parametrize(
    "fields",
    [
        {"authorization": f"Bearer {SEARCH_KEY}"},
        {"authorization": f"bearer  {SEARCH_KEY} "},
        {"x-api-key": SEARCH_KEY},
        {"api-key": SEARCH_KEY},
        {"X-API-Key": SEARCH_KEY},
    ],
)
async def test_a_key_comes_in_the_header_of_any_sdk(flow: Flow, fields: dict[str, str]) -> None:
    assert (await flow.call(request("POST", CHAT, chat_body(), fields))).status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {SEARCH_KEY}x"},
        {"authorization": f"Bearer {SEARCH_KEY[:-1]}"},
        {"authorization": f"Basic {SEARCH_KEY}"},
        {"authorization": SEARCH_KEY},
        {"authorization": f"Bearer {hashlib.sha256(SEARCH_KEY.encode()).hexdigest()}"},
        {"x-api-key": ""},
        {"api-key": "\xe4\xf6"},
        {"cookie": f"key={SEARCH_KEY}"},
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_an_unknown_key_gets_401_in_the_dialect_of_the_path(
    flow: Flow, path: str, fields: dict[str, str]
) -> None:
    model = "claude" if path == MESSAGES else "gpt"
    answer = await flow.call(request("POST", path, chat_body(model), fields))
    assert (answer.status, answer.header("x-sidecar-error")) == (401, "invalid_api_key")
    assert answer.error["type"] == "authentication_error"
    assert answer.error["code"] == "invalid_api_key"
    assert ("request_id" in answer.json) == (path == MESSAGES)
    assert not flow.provider.books.requests
    (line,) = await flow.logged()
    assert (line["team"], line["status"], line["model"]) == ("unknown", 401, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no API key was sent: send `Authorization: Bearer KEY` or `x-api-key: KEY`"),
        (
            {"x-api-key": ""},
            "no API key was sent: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
        ),
        ({"api-key": "wrong"}, "this API key is not known here"),
    ],
)
async def test_a_call_without_a_key_is_told_so(
    flow: Flow, fields: dict[str, str], message: str
) -> None:
    answer = await flow.call(request("POST", CHAT, chat_body(), fields))
    assert answer.status == 401
    assert answer.error["message"] == message


async def test_an_unknown_key_learns_nothing_of_models_and_upstreams(flow: Flow) -> None:
    for path in ("/v1/models", "/v1/models/gpt", "/up-openai/x", "/nowhere", "/v1/other"):
        for method in ("GET", "POST"):
            assert (await flow.call(request(method, path))).status == 401


# Models


@pytest.mark.parametrize(
    ("model", "status"),
    [("gpt", 200), ("qwen-7", 200), ("qwen-72", 404), ("gpt-mini", 404), ("none", 404)],
)
async def test_a_team_uses_its_own_models_only(flow: Flow, model: str, status: int) -> None:
    answer = await chat(flow, SEARCH_KEY, model)
    assert answer.status == status
    if status == 404:
        assert answer.error["code"] == "model_not_found"
        assert len(flow.provider.books.requests) == 0


async def test_a_model_of_another_team_looks_like_one_that_does_not_exist(flow: Flow) -> None:
    other, none = await chat(flow, SEARCH_KEY, "gpt-mini"), await chat(flow, SEARCH_KEY, "gpt-none")
    assert other.body.replace(b"gpt-mini", b"gpt-none") == none.body


async def test_openai_clients_see_the_models_of_their_team(flow: Flow) -> None:
    search = await flow.call(request("GET", "/v1/models", b"", keyed(SEARCH_KEY)))
    shop = await flow.call(request("GET", "/v1/models", b"", keyed(SHOP_KEY)))
    assert search.json["object"] == "list"
    assert [each["id"] for each in search.json["data"]] == ["gpt"]
    assert {each["id"] for each in shop.json["data"]} == {"gpt", "gpt-mini", "claude"}
    assert search.json["data"][0]["object"] == "model"


async def test_anthropic_clients_see_them_in_their_own_shape(flow: Flow) -> None:
    fields = {"x-api-key": SEARCH_KEY, "anthropic-version": "2023-06-01"}
    answer = await flow.call(request("GET", "/v1/models", b"", fields))
    assert answer.json["data"][0]["type"] == "model"
    assert answer.json["has_more"] is False
    assert answer.json["first_id"] == answer.json["last_id"] == "gpt"


@pytest.mark.parametrize(("model", "status"), [("gpt", 200), ("gpt-mini", 404), ("x", 404)])
async def test_one_model_can_be_asked_for(flow: Flow, model: str, status: int) -> None:
    answer = await flow.call(request("GET", f"/v1/models/{model}", b"", keyed(SEARCH_KEY)))
    assert answer.status == status
    assert status == 404 or answer.json["id"] == model


# Upstreams


async def test_an_upstream_is_reached_directly_by_teams_that_name_it_only(flow: Flow) -> None:
    shop = await flow.call(request("GET", "/up-openai/files", b"", keyed(SHOP_KEY)))
    other = await flow.call(request("GET", "/up-anthropic/files", b"", keyed(SHOP_KEY)))
    search = await flow.call(request("GET", "/up-openai/files", b"", keyed(SEARCH_KEY)))
    assert [shop.status, other.status, search.status] == [200, 403, 403]
    assert search.error["code"] == "upstream_not_allowed"
    assert len(flow.provider.books.requests) == 1


@pytest.mark.parametrize(("path", "model"), [(CHAT, "claude"), (MESSAGES, "gpt")])
async def test_a_model_of_the_other_dialect_gets_400_that_names_the_right_path(
    flow: Flow, path: str, model: str
) -> None:
    answer = await flow.call(request("POST", path, chat_body(model), keyed(SHOP_KEY)))
    assert (answer.status, answer.error["code"]) == (400, "wrong_dialect")
    assert (MESSAGES if model == "claude" else CHAT) in answer.error["message"]
    assert not flow.provider.books.requests


# Filters of a team


async def test_a_team_overrides_the_settings_of_a_filter(flow: Flow) -> None:
    search, shop = await chat(flow, SEARCH_KEY), await chat(flow, SHOP_KEY)
    names = [[name for name, _ in each.headers] for each in (search, shop)]
    assert "x-shop-id" not in names[0]
    assert "x-shop-id" in names[1]
    received = flow.provider.books.requests
    assert received[0].header("x-request-id") == search.header("x-request-id")
    assert received[1].header("x-shop-id") == shop.header("x-shop-id")


async def test_a_fixed_team_needs_no_key(start: Start) -> None:
    flow = await start(CONFIG + "team: search\n", files=TEAMS, environ={"SEARCH_KEY": ENV_KEY})
    answers = [await flow.call(chat_request(model)) for model in ("gpt", "gpt-mini")]
    assert [each.status for each in answers] == [200, 404]
    assert (await chat(flow, SHOP_KEY, "gpt-mini")).status == 404
    assert {line["team"] for line in await flow.logged(3)} == {"search"}


# What the upstream gets to see


@pytest.mark.parametrize("target", ["/up-openai/x", CHAT])
async def test_credentials_of_the_client_never_reach_the_upstream(flow: Flow, target: str) -> None:
    fields = {
        "authorization": f"Bearer {SHOP_KEY}",
        "x-api-key": "mine-1",
        "api-key": "mine-2",
        "x-goog-api-key": "mine-3",
        "cookie": "session=mine-4",
        "proxy-authorization": "Basic mine-5",
    }
    answer = await flow.call(request("POST", target, chat_body(), fields))
    assert answer.status == 200
    (received,) = flow.provider.books.requests
    seen = json.dumps(received.headers)
    assert "mine-" not in seen
    assert SHOP_KEY not in seen
    assert received.header_values("authorization") == [f"Bearer {PROVIDER_KEY}"]


async def test_the_key_of_an_upstream_reaches_it_and_nobody_else(flow: Flow) -> None:
    answers = [await chat(flow, SHOP_KEY, "claude"), await chat(flow, SHOP_KEY, "none")]
    (received,) = flow.provider.books.requests
    assert received.header("x-api-key") == PROVIDER_KEY
    assert received.header("authorization") is None
    assert PROVIDER_KEY not in repr(answers)
    await flow.logged(2)
    told = flow.log_path.read_text() + repr([record.__dict__ for record in flow.records])
    assert PROVIDER_KEY not in told
    assert SHOP_KEY not in told


async def test_the_host_of_the_client_never_reaches_the_upstream(flow: Flow) -> None:
    fields = {"host": "evil.example", **keyed(SHOP_KEY)}
    assert (await flow.call(request("POST", CHAT, chat_body(), fields))).status == 200
    assert flow.provider.books.requests[0].header_values("host") == ["localhost"]
