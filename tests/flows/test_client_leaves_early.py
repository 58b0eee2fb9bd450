"""A client that leaves before its request is whole is in the log all the same."""

from __future__ import annotations

from tests.support.flow import Flow, until


async def test_a_client_that_leaves_within_its_body_gets_a_line_in_the_access_log(
    flow: Flow,
) -> None:
    client = await flow.connect()
    client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b'content-length: 1000\r\n\r\n{"model":"gpt",'
    )
    await until(lambda: flow.server.snapshot.open_calls == 1)
    client.leave()
    (line,) = await flow.logged(1)
    assert (line["outcome"], line["status"], line["attempts"]) == ("client_gone", 0, 0)
    assert not flow.provider.books.requests
