"""One id on the answer, at the upstream and in the log: the caller's, or one of ours."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from filters.access_log import AccessLog
from filters.request_id import RequestId
from sidecar.errors import Rejected
from tests.support.harness import Harness, Run, Use


async def run(settings: dict[str, Any], *headers: tuple[str, str]) -> tuple[Run, Harness]:
    async with Harness(Use(RequestId, settings), AccessLog) as harness:
        return await harness.run(harness.call(headers=headers)), harness


def ids(run: Run, harness: Harness, header: str = "x-request-id") -> set[str]:
    """The id on every side; one when all is well."""
    (sent,) = harness.upstream.sent
    return {run.client.headers[header], sent.headers[header], harness.lines[0]["id"]}


@pytest.mark.parametrize("theirs", ["a", "req-1", "A.b_C:9-z", "0" * 128])
async def test_callers_id_is_taken(theirs: str) -> None:
    assert ids(*await run({}, ("X-Request-ID", theirs))) == {theirs}


@pytest.mark.parametrize(
    "theirs",
    ["", "0" * 129, "a b", "a\tb", "a;b", "é", "<script>", "a\udcff", "a/b", "a\n", "{}", '"a"'],
)
async def test_id_that_could_do_harm_in_a_log_is_replaced(theirs: str) -> None:
    result, harness = await run({}, ("x-request-id", theirs))
    assert ids(result, harness) == {"call_1"}


async def test_id_is_made_when_there_is_none() -> None:
    assert ids(*await run({})) == {"call_1"}


async def test_callers_id_is_not_taken_when_that_is_switched_off() -> None:
    result, harness = await run({"accept": False}, ("x-request-id", "theirs"))
    assert ids(result, harness) == {"call_1"}


async def test_header_may_have_another_name() -> None:
    result, harness = await run({"header": "X-Trace"}, ("x-trace", "t-1"), ("x-request-id", "r"))
    assert ids(result, harness, "x-trace") == {"t-1"}
    assert harness.upstream.sent[0].headers["x-request-id"] == "r"
    assert "x-request-id" not in result.client.headers


async def test_upstreams_own_id_does_not_stand_beside_ours() -> None:
    async with Harness(RequestId) as harness:
        answer = harness.upstream.whole(b"{}")

        async def with_id(attempt: Any) -> Any:
            reply = await answer(attempt)
            reply.headers["x-request-id"] = "upstream's"
            return reply

        harness.upstream.answer = with_id
        result = await harness.run()
    assert result.client.headers["x-request-id"] == "call_1"


async def test_error_of_the_upstream_carries_the_id() -> None:
    async with Harness(RequestId) as harness:
        harness.upstream.answer = harness.upstream.failing()
        result = await harness.run(harness.call(headers=[("x-request-id", "req-1")]))
    assert (result.client.status, result.client.headers["x-request-id"]) == (502, "req-1")


async def test_refusal_by_the_edge_carries_the_id() -> None:
    refusal = Rejected(401, "invalid_api_key", "this API key is not known here")
    async with Harness(RequestId) as harness:
        call = harness.call(headers=[("x-request-id", "req-1")], refusal=refusal)
        result = await harness.run(call)
    assert (result.client.status, result.client.headers["x-request-id"]) == (401, "req-1")


@pytest.mark.parametrize("header", ["", "a b", "x:y", "host", "Content-Length", "connection"])
def test_header_that_cannot_be_sent_does_not_load(header: str) -> None:
    with pytest.raises(ValidationError):
        RequestId.Config.model_validate({"header": header})
