"""A body that names two models would be read as the one by us and as the other by the upstream."""

from __future__ import annotations

import pytest

from tests.support.flow import Flow, request

CHAT = "/v1/chat/completions"
MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"other","model":"gpt",' + MESSAGES + b"}",
        b'{"model":"gpt",' + MESSAGES + b',"model":"other"}',
        b'{"mod\\u0065l":"other","model":"gpt",' + MESSAGES + b"}",
        b'{"\\u006dodel":"other","\\u006Dodel":"gpt",' + MESSAGES + b"}",
    ],
)
async def test_a_body_that_names_two_models_is_refused(flow: Flow, body: bytes) -> None:
    answer = await flow.call(request("POST", CHAT, body))
    assert (answer.status, answer.header("x-sidecar-error")) == (400, "duplicate_model")
    assert not flow.provider.books.requests


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"gpt","metadata":{"model":"other"},' + MESSAGES + b"}",
        b'{"mod\\u0065l":"gpt",' + MESSAGES + b"}",
        b'{"model":"gpt","messages":[{"role":"user","content":"\\"model\\": \\u0065"}]}',
    ],
)
async def test_the_word_model_elsewhere_in_a_body_is_no_second_model(
    flow: Flow, body: bytes
) -> None:
    assert (await flow.call(request("POST", CHAT, body))).status == 200


async def test_a_deeply_nested_body_is_refused_and_not_a_crash(flow: Flow) -> None:
    body = b'{"model":"gpt","model":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    answer = await flow.call(request("POST", CHAT, body))
    assert answer.status == 400


async def test_a_large_body_that_names_two_models_is_refused_too(flow: Flow) -> None:
    padding = b'"user":"' + b"x" * 1_000_000 + b'",'
    body = b'{"model":"other",' + padding + b'"model":"gpt",' + MESSAGES + b"}"
    answer = await flow.call(request("POST", CHAT, body))
    assert (answer.status, answer.header("x-sidecar-error")) == (400, "duplicate_model")
