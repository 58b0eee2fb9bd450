"""What is lost when orjson reads JSON is seen."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.exact_json import has_large_float, is_exact

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(-1e15, 1e15)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON, st.booleans())
def test_what_every_reader_reads_alike_is_exact(value: object, is_ascii: bool) -> None:
    data = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace")
    try:
        read = orjson.loads(data)
    except orjson.JSONDecodeError:  # half of a character in two parts
        return
    assert is_exact(data, read)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 18446744073709551616}',
        b'{"a": [-9223372036854775809]}',
        b"123456789012345678901234567890",
        b'{"a": "1e20", "b": 99999999999999999999}',
        b'{"a": 1, "a": 2}',
        b'[{"b": {"a": 1, "c": 2, "a": 1}}]',
        b'{"a": 1, "\\u0061": 2}',
        b'{"a": "\\u0022", "b": 1, "b": 2}',
    ],
)
def test_a_rounded_number_and_a_name_that_stands_twice_are_not(data: bytes) -> None:
    assert not is_exact(data, orjson.loads(data))


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 18446744073709551615, "b": -9223372036854775808}',
        b'{"a": "99999999999999999999", "b": "1e+20", "c": 1e-9}',
        b'{"a": "\\u0022", "b": "\\"", "\\u0022": 1}',
        b'{"a": 0.1234567890123456789}',
    ],
)
def test_what_only_looks_like_it_is_exact(data: bytes) -> None:
    assert is_exact(data, orjson.loads(data))


def test_what_cannot_be_written_again_is_not_exact() -> None:
    data = b"[" * 400 + b"]" * 400
    assert not is_exact(data, orjson.loads(data))


def test_a_text_is_no_number() -> None:
    assert has_large_float(b'{"a":1e+20}')
    assert not has_large_float(b'{"a":"\\"1e+20"}')
