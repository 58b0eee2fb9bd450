"""Addresses that tokens are fetched from, and answers that bring one or do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from filters.signers.exchange import LONGEST_TOKEN, TokenUrl, read_token
from filters.stores.tokens import NoToken


class Settings(BaseModel):
    url: TokenUrl


def read(answer: Any, status: int = 200) -> tuple[str, dict[str, Any]]:
    return read_token("token", status, json.dumps(answer).encode(), {"known", "also known"})


@pytest.mark.parametrize(
    ("url", "wire"),
    [
        ("https://host.example/oauth/2.0/token", "https://host.example/oauth/2.0/token"),
        ("HTTPS://Host.Example:8443/Path%2f", "https://host.example:8443/Path%2f"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/"),
        ("http://[::1]:8080/a", "http://[::1]:8080/a"),
    ],
)
def test_address_is_kept_but_for_the_case_of_the_host(url: str, wire: str) -> None:
    assert Settings(url=url).url == wire


@pytest.mark.parametrize(
    "url",
    [
        *("", "host", "host/path", "//host/path", "https://", "https:///path", "ftp://host/"),
        *("https://host/?", "https://host/?a=b", "https://host/#a", "https://user@host/"),
        *("https://host:port/", "https://host:0/", "https://host:99999/", "https://[::1/"),
        *("https://host/a b", "https://host/é", "https://host/\n", "https://host\\@other/"),
    ],
)
def test_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        Settings(url=url)


@pytest.mark.parametrize("status", [200, 201])
def test_token_comes_with_the_fields_beside_it(status: int) -> None:
    answer = {"token": "bce-v3/ALTAK-x/y==", "expires": 5}
    assert read(answer, status) == ("bce-v3/ALTAK-x/y==", answer)
    assert read({"token": "t" * LONGEST_TOKEN})[0] == "t" * LONGEST_TOKEN


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b'{"token":', b"NaN", b"[]", b'"a"'])
def test_answer_without_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(NoToken, match="status 502 without a JSON object"):
        read_token("token", 502, body, ())


@pytest.mark.parametrize("status", [200, 302, 400, 401, 500])
def test_words_that_are_known_are_told_of_an_error(status: int) -> None:
    answer = {"error": "known", "more": ["known"], "at": 5, "description": "also known"}
    with pytest.raises(NoToken) as caught:
        read(answer, status)
    assert str(caught.value) == f"instead of a token came status {status}: known: also known"


def test_other_words_are_not_told_for_they_may_repeat_a_secret() -> None:
    with pytest.raises(NoToken) as caught:
        read({"error": "known", "description": "no such key as hidden"}, 401)
    assert str(caught.value) == "instead of a token came status 401: known"


def test_token_of_an_answer_that_is_no_success_is_not_taken() -> None:
    with pytest.raises(NoToken, match=r"came status 500$"):
        read({"token": "hidden"}, 500)


@pytest.mark.parametrize(
    "token",
    [
        *("", 5, True, ["hidden"], {"hidden": 1}, "hidden\r\nx: y", "hidden token"),
        *("hidden\n", "hiddené", "hidden\x7f", "h" * (LONGEST_TOKEN + 1)),
    ],
)
def test_token_that_cannot_be_sent_is_refused_without_being_shown(token: Any) -> None:
    with pytest.raises(NoToken, match="the token that came cannot be sent") as caught:
        read({"token": token})
    assert "hidden" not in str(caught.value)
