"""A page in somebody's browser must not spend the provider's key."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.support.flow import Flow, Start, chat_request


async def test_a_page_of_another_origin_may_not_call_where_no_key_is_asked_for(flow: Flow) -> None:
    answer = await flow.call(chat_request(origin="https://elsewhere.example"))
    assert answer.status == 403
    assert answer.header("x-sidecar-error") == "origin_not_allowed"
    assert not flow.provider.books.requests


async def test_a_listed_origin_may_call(start: Start) -> None:
    flow = await start("http: {allowed_origins: ['http://localhost:3000']}\n")
    answer = await flow.call(chat_request(origin="http://localhost:3000"))
    assert answer.status == 200


async def test_a_caller_with_a_team_key_may_come_from_any_origin(
    start: Start, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"key-of-search-team").hexdigest()
    (tmp_path / "search.yaml").write_text(f"team: search\nkeys: ['sha256:{digest}']\n")
    flow = await start(f"teams: '{tmp_path}/search.yaml'\n")
    answer = await flow.call(
        chat_request(origin="https://app.example", authorization="Bearer key-of-search-team")
    )
    assert answer.status == 200
