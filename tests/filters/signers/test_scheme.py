"""What signers share: canonical forms of paths and queries, and what a scheme promises."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from urllib.parse import parse_qsl, quote, quote_plus, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.signers import SCHEMES, find
from filters.signers.scheme import (
    Request,
    encode,
    encode_path,
    parameters,
    with_parameters,
)
from filters.signers.vector import sign_vector
from sidecar.api import Secret

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def request(**more: object) -> Request:
    blank = Request("GET", "a.test", "/", "", (), b"")
    return blank._replace(**more)


# Paths and queries


@given(TEXT)
def test_encoding_keeps_unreserved_characters_alone(text: str) -> None:
    encoded = encode(text)
    assert unquote(encoded) == text
    assert set(encoded) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~%"
    )


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a%2Fb%2fc/d", "/a/b/c/d"),
        ("/a%252Fb", "/a%252Fb"),
        ("/a//b/../c/.", "/a//b/../c/."),
        ("/%e6%b5%8b", "/%E6%B5%8B"),
        ("/%41~%7e", "/A~~"),
        ("/a+b:c", "/a%2Bb%3Ac"),
        ("/%ff", "/%FF"),
        ("/a/", "/a/"),
        ("/100%", "/100%25"),
    ],
)
def test_every_spelling_of_a_path_has_one_canonical_form(path: str, canonical: str) -> None:
    assert encode_path(path) == canonical


@given(st.lists(TEXT, max_size=5))
def test_canonical_path_says_the_decoded_path(segments: list[str]) -> None:
    path = "/" + "/".join(segments)
    for spelling in (quote(path), quote(path, safe=""), quote(path, safe="/~:!$&'()*+,;=@")):
        assert encode_path(spelling) == quote(path, safe="/~")


@pytest.mark.parametrize(
    ("query", "pairs"),
    [
        ("", []),
        ("a=1&b=2", [("a", "1"), ("b", "2")]),
        ("a", [("a", "")]),
        ("a=&a=2&a", [("a", ""), ("a", "2"), ("a", "")]),
        ("a=b=c", [("a", "b=c")]),
        ("a=x+y%20z", [("a", "x y z")]),
        ("&&a=1&", [("a", "1")]),
        ("%E6%B5%8B=%E8%AF%95", [("测", "试")]),
    ],
)
def test_parameters_keep_order_repeats_and_empty_values(
    query: str, pairs: list[tuple[str, str]]
) -> None:
    assert parameters(query) == pairs


@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_parameters_read_what_a_form_writes(pairs: list[tuple[str, str]]) -> None:
    query = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs)
    assert parameters(query) == [pair for pair in pairs if pair != ("", "") or query.count("=")]


def test_bytes_that_are_no_text_survive_the_canonical_form() -> None:
    ((name, value),) = parameters("%ff=%fe")
    assert (encode(name), encode(value)) == ("%FF", "%FE")


@pytest.mark.parametrize(
    ("query", "result"),
    [
        ("", "key=k%2F%20"),
        ("a=%2f&b", "a=%2f&b&key=k%2F%20"),
        ("key=client&a=1&k%65y=again&key", "a=1&key=k%2F%20"),
        ("keys=1", "keys=1&key=k%2F%20"),
    ],
)
def test_parameters_that_are_put_replace_those_of_their_name(query: str, result: str) -> None:
    assert with_parameters(query, {"key": "k/ "}) == result
    assert with_parameters(query, {"key": "k/ "}, quote_plus) == result.replace("%20", "+")


@given(st.dictionaries(TEXT.filter(bool), TEXT, max_size=4))
def test_parameters_that_are_put_can_be_read_again(mine: dict[str, str]) -> None:
    query = with_parameters("x=1", mine)
    assert dict(parse_qsl(query, keep_blank_values=True)) == {"x": "1", **mine}


# Requests


def test_header_is_trimmed_and_its_repeats_are_joined() -> None:
    made = request(headers=(("a", " 1 "), ("b", "2"), ("a", "\t3")))
    assert made.header("a") == "1,3"
    assert made.header("c") is None


def test_request_goes_by_https_unless_it_says_otherwise() -> None:
    assert request().url_scheme == "https"
    assert Request._fields[-1] == "url_scheme"


# Plain schemes


@pytest.mark.parametrize(
    ("scheme", "credentials", "options", "headers", "query"),
    [
        ("bearer", {"key": "k"}, {}, {"Authorization": "Bearer k"}, "?a=1"),
        ("header", {"key": "k"}, {}, {"x-api-key": "k"}, "?a=1"),
        ("header", {"key": "k"}, {"name": "X-Token"}, {"x-token": "k"}, "?a=1"),
        ("api-key", {"key": "k"}, {}, {"api-key": "k"}, "?a=1"),
        ("x-goog-api-key", {"key": "k"}, {}, {"x-goog-api-key": "k"}, "?a=1"),
        ("query", {"key": "k/&"}, {}, {}, "?a=1&key=k%2F%26"),
        ("query", {"key": "k"}, {"name": "a"}, {}, "?a=k"),
        # RFC 7617, 2 and 2.1.
        (
            "basic",
            {"password": "open sesame"},
            {"username": "Aladdin"},
            {"Authorization": "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="},
            "?a=1",
        ),
        (
            "basic",
            {"password": "123\u00a3"},
            {"username": "test"},
            {"Authorization": "Basic dGVzdDoxMjPCow=="},
            "?a=1",
        ),
    ],
)
def test_plain_schemes_put_the_key_where_the_provider_reads_it(
    scheme: str,
    credentials: dict[str, str],
    options: dict[str, str],
    headers: dict[str, str],
    query: str,
) -> None:
    vector = {
        "scheme": scheme,
        "credentials": credentials,
        "options": options,
        "request": {"method": "GET", "url": "https://a.test/v1?a=1"},
    }
    signed = sign_vector(vector, now=0.0, nonce="")
    assert signed["headers"] == headers
    assert signed["url"] == f"https://a.test/v1{query}"


@pytest.mark.parametrize(
    ("query", "wire"),
    [
        ("key=theirs", ""),
        ("a=%2f&key=theirs&b", "?a=%2f&b"),
        ("k%65y=theirs&a=1&key", "?a=1"),
        ("keys=1&a=key", "?keys=1&a=key"),
    ],
)
def test_google_s_key_in_the_query_is_taken_off(query: str, wire: str) -> None:
    vector = {
        "scheme": "x-goog-api-key",
        "credentials": {"key": "k"},
        "request": {"method": "GET", "url": f"https://a.test/v1?{query}"},
    }
    signed = sign_vector(vector, now=0.0, nonce="")
    assert signed["headers"] == {"x-goog-api-key": "k"}
    assert signed["url"] == f"https://a.test/v1{wire}"


# Every scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_is_what_its_fields_say(name: str) -> None:
    scheme = find(name)
    assert all(each == each.lower() for each in scheme.own_headers)
    assert "authorization" in scheme.own_headers
    assert "host" not in scheme.own_headers
    assert scheme.exchange is None or not scheme.is_fixed
    assert not set(scheme.Credentials.model_fields) & set(scheme.Options.model_fields)
    assert inspect.getmodule(scheme.sign).__doc__  # type: ignore[union-attr]
    for settings in (scheme.Credentials, scheme.Options):
        assert settings.__doc__
        assert not {"scheme", "pool", "set_aside_s", "keys"} & set(settings.model_fields)


@pytest.mark.parametrize("name", SCHEMES)
def test_signing_awaits_nothing(name: str) -> None:
    assert not inspect.iscoroutinefunction(find(name).sign)


@pytest.mark.parametrize("name", SCHEMES)
def test_options_are_explained_beside_their_field(name: str) -> None:
    options = find(name).Options
    if len(options.model_fields) < 2:
        return  # the class's own docstring speaks of it
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(node, ast.ClassDef)
    explained = {
        field.target.id
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
    }
    assert set(options.model_fields) == explained


SENT_AS_THEY_ARE = {
    "bce-auth-v1": ("access_key_id", "security_token"),
    "bce-bearer": ("access_key_id", "security_token"),
    "ACS3-HMAC-SHA256": ("access_key_id", "security_token"),
    "TC3-HMAC-SHA256": ("secret_id", "token"),
    "volcengine-HMAC-SHA256": ("access_key_id", "session_token"),
    "volcengine-ark": ("access_key_id", "session_token"),
    "AWS4-HMAC-SHA256": ("access_key_id", "session_token"),
}
"""The secrets of each scheme that go into a header."""


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, each in SENT_AS_THEY_ARE.items() for field in each]
)
def test_secret_that_no_header_can_carry_is_refused_without_being_shown(
    name: str, field: str
) -> None:
    credentials = find(name).Credentials
    values = {each: Secret("a-good-one") for each in credentials.model_fields}
    credentials(**values)
    values[field] = Secret("hidden\r\nvalue")
    with pytest.raises(ValidationError) as caught:
        credentials(**values)
    assert field in str(caught.value)
    assert "hidden" not in str(caught.value)
