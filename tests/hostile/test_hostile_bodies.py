"""JSON bodies made to hurt: they are refused in the client's dialect, or passed on as they are."""

from __future__ import annotations

import pytest

from tests.support.flow import CHAT, MESSAGES, Flow, chat_body, request


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"gpt"',
        b"{",
        b'{"model":"gpt"',
        b'{"model":"gpt"}}',
        b'{"model":"gpt"}{"model":"gpt"}',
        b"{'model':'gpt'}",
        b'{"model":"gpt",}',
        b'{"model":"gpt","x":NaN}',
        b'{"model":"gpt","x":01}',
        b'{"model":"gpt","x":"\xff"}',
        b'{"model":"gpt","x":"\n"}',
        b'\xef\xbb\xbf{"model":"gpt"}',
        '{"model":"gpt"}'.encode("utf-16"),
        b'{"model":"\\ud800"}',
        b'{"model":"gpt","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"gpt","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b"\x00",
        b"%00",
        b"model=gpt",
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_what_is_no_json_object_gets_400(flow: Flow, path: str, body: bytes) -> None:
    answer = await flow.call(request("POST", path, body))
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")
    assert ("request_id" in answer.json) == (path == MESSAGES)
    assert not flow.provider.books.requests


@pytest.mark.parametrize(
    "model", [b"null", b"1", b'""', b"[]", b'{"a":1}', b"true", b'["gpt"]', b'{"model":"gpt"}']
)
async def test_a_model_that_is_no_name_gets_400(flow: Flow, model: bytes) -> None:
    answer = await flow.call(request("POST", CHAT, b'{"model":' + model + b"}"))
    assert (answer.status, answer.error["code"]) == (400, "model_required")


@pytest.mark.parametrize(
    "model",
    [
        "a\\r\\nset-cookie: x=1",
        "\\u0000",
        "../../etc/passwd",
        "gpt\\u0000",
        " gpt",
        "GPT",
        "g*",
        "*",
        "\\u202egpt",
        "<script>",
        "{model}",
        "%s%n",
    ],
)
async def test_a_strange_model_is_not_found_and_does_no_harm(flow: Flow, model: str) -> None:
    body = f'{{"model":"{model}"}}'.encode()
    for path in (CHAT, MESSAGES):
        answer = await flow.call(request("POST", path, body))
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert answer.header("set-cookie") is None
    assert not flow.provider.books.requests


async def test_a_huge_model_name_is_not_repeated_in_answer_and_log(flow: Flow) -> None:
    answer = await flow.call(request("POST", CHAT, chat_body("m" * 1_000_000)))
    assert answer.status == 404
    assert len(answer.body) < 1000
    await flow.logged()
    assert flow.log_path.stat().st_size < 2000


async def test_numbers_and_names_that_json_allows_are_passed_on(flow: Flow) -> None:
    body = (
        b'{"model":"gpt","messages":[{"role":"user","content":"x"}],"":1,"a":1e400,'
        b'"b":-0,"c":123456789012345678901234567890,"d":1.0000000000000000001}'
    )
    answer = await flow.call(request("POST", CHAT, body))
    assert answer.status in (200, 400)
    for received in flow.provider.books.requests:
        assert received.body == body
