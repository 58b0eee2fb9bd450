"""Request targets and methods that try to reach what is not offered."""

from __future__ import annotations

import pytest

from tests.support.flow import CHAT, Flow, chat_body, chat_request, request

TRICKS = [
    "/up-openai/../secret",
    "/up-openai/..",
    "/up-openai/./x",
    "/up-openai/a/../../x",
    "/up-openai/%2e%2e/secret",
    "/up-openai/%2E%2e/secret",
    "/up-openai/.%2e/secret",
    "/up-openai/a%2f..%2fsecret",
    "/up-openai/..%2fsecret",
    "/up-openai/..%5csecret",
    "/up-openai//secret",
    "/up-openai//evil.example/secret",
    "/up-openai/\\secret",
    "/up-openai\\..\\secret",
    "/up-openai/..;/secret",
    "/up-openai/x/..?q=1",
    "//up-openai/x",
    "/../up-openai/x",
    "/./up-openai/x",
    "/%75p-openai/x/../y",
    "/up-openai%2f..%2fsecret",
]


@pytest.mark.parametrize("path", TRICKS)
async def test_a_path_with_dot_segments_reaches_no_upstream(flow: Flow, path: str) -> None:
    answer = await flow.call(request("GET", path))
    assert answer.status in (400, 404)
    assert answer.error["code"] in ("invalid_path", "not_found")
    assert not flow.provider.books.requests


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../admin",
        "/v1/..",
        "/v1/x/../../admin",
        "/v1/%2e%2e/admin",
        "/v1/./x",
        "/v1//admin",
        "/v1/a\\..\\b",
        "/v1/chat/completions/../../../admin",
    ],
)
async def test_an_unknown_api_path_with_dot_segments_reaches_no_upstream(
    flow: Flow, path: str
) -> None:
    answer = await flow.call(request("POST", path, chat_body()))
    assert answer.status in (400, 404)
    assert not flow.provider.books.requests


@pytest.mark.parametrize("path", ["/v1/models/../x", "/v1/models/%2e%2e/x", "/v1/models//"])
async def test_the_list_of_models_is_no_way_out(flow: Flow, path: str) -> None:
    assert (await flow.call(request("GET", path))).status in (200, 400, 404)
    assert not flow.provider.books.requests


@pytest.mark.parametrize(
    "target",
    [
        "http://evil.example/up-openai/x",
        "http://127.0.0.1:1/up-openai/x",
        "HTTP://evil.example/up-openai/x",
    ],
)
async def test_an_absolute_target_means_its_path_alone(flow: Flow, target: str) -> None:
    answer = await flow.call(request("GET", target))
    assert answer.status == 200
    (received,) = flow.provider.books.requests
    assert received.path == "/v1/x"
    assert b"evil.example" not in b"".join(value for _, value in received.raw_headers)


@pytest.mark.parametrize(
    "target", ["http://evil.example", "http://evil.example/", "*", "http://", "http:///x", "x"]
)
async def test_a_target_without_a_path_of_ours_is_not_found(flow: Flow, target: str) -> None:
    client = await flow.connect()
    answer = await client.call(request("GET", target))
    assert answer.status in (400, 404)
    assert not flow.provider.books.requests


async def test_connect_opens_no_tunnel(flow: Flow) -> None:
    client = await flow.connect()
    client.send(b"CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example:443\r\n\r\n")
    client.send(chat_request())
    answer = await client.answer()
    assert answer.status in (400, 405)
    assert await client.is_closed()
    assert not flow.provider.books.requests


@pytest.mark.parametrize("path", [CHAT, "/up-openai/x"])
async def test_trace_is_not_served(flow: Flow, path: str) -> None:
    answer = await flow.call(request("TRACE", path, b"", {"authorization": "Bearer canary"}))
    assert answer.status == 405
    assert b"canary" not in answer.body
    assert not flow.provider.books.requests


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
async def test_a_known_path_takes_its_own_method_only(flow: Flow, method: str) -> None:
    answer = await flow.call(request(method, CHAT), is_head=method == "HEAD")
    assert answer.status == 405
    assert answer.header("allow") == "POST"
    assert answer.header("x-sidecar-error") == "method_not_allowed"


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/config", "/v2/chat/completions"])
async def test_nothing_else_is_served_on_the_data_port(flow: Flow, path: str) -> None:
    answer = await flow.call(request("GET", path))
    assert (answer.status, answer.error["code"]) == (404, "not_found")


async def test_a_path_that_is_not_ascii_is_refused(flow: Flow) -> None:
    head = "GET /up-openai/\u00e4 HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    assert (await flow.call(head)).status == 400
    head = "GET /up-openai/x?q=\u00e4 HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    assert (await flow.call(head)).status == 400
    assert not flow.provider.books.requests


async def test_a_fragment_never_reaches_the_upstream(flow: Flow) -> None:
    answer = await flow.call(request("GET", "/up-openai/x#fragment"))
    assert answer.status in (200, 400)
    for received in flow.provider.books.requests:
        assert "#" not in received.path + received.query
