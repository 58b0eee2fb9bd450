"""What is written is read back whole, or not at all."""

from __future__ import annotations

import tracemalloc
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.stores.entry import Entry, decode, encode, is_of, size_of
from sidecar.api import Usage
from tests.support.cached import entry

counts = st.integers(0, 2**32 - 1)
tokens = st.integers(0, 2**40)
fields = st.tuples(st.binary(max_size=20), st.binary(max_size=40))
texts = st.text(st.characters(), max_size=20)  # surrogates included
times = st.floats(0, 1e11, allow_nan=False)
entries = st.builds(
    Entry,
    status=st.integers(200, 599),
    headers=st.lists(fields, max_size=5).map(tuple),
    media_type=texts,
    body=st.binary(max_size=300),
    rhythm=st.lists(st.tuples(counts, counts), max_size=20).map(tuple),
    usage=st.none() | st.builds(lambda tokens: Usage(*tokens), st.lists(tokens, max_size=5)),
    team=texts,
    model=texts,
    upstream=texts,
    upstream_model=texts,
    created_at=times,
    expires_at=times,
)

STREAM = entry(b"data: 1\n\ndata: 2\n\n", rhythm=((0, 9), (31, 9)))


@given(entries)
def test_entry_comes_back_as_it_was(written: Entry) -> None:
    read = decode(encode(written))
    assert read == written
    assert read is not None
    assert type(read.usage) is type(written.usage)
    assert size_of(read) == size_of(written)


def test_every_single_wrong_bit_is_noticed() -> None:
    data = encode(STREAM)
    for place in range(len(data)):
        for bit in range(8):
            torn = bytearray(data)
            torn[place] ^= 1 << bit
            assert decode(bytes(torn)) is None, (place, bit)


def test_every_shorter_and_longer_piece_is_noticed() -> None:
    data = encode(STREAM)
    assert all(decode(data[:length]) is None for length in range(len(data)))
    assert decode(data + b"\0") is None
    assert decode(data + data) is None


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_entry(data: bytes) -> None:
    assert decode(data) is None


@pytest.mark.parametrize("facts", [b"[]", b"nothing", b"[1,2,3,4,5,6,7,8,9,10]", b"\xff"])
def test_right_checksum_over_something_else_is_no_entry(facts: bytes) -> None:
    data = encode(entry())
    head = data[:5] + len(facts).to_bytes(4, "little") + bytes(12) + facts
    assert decode(head + crc32(head).to_bytes(4, "little")) is None


def test_entry_of_another_version_is_not_read() -> None:
    data = bytearray(encode(entry()))[:-4]
    data[4] += 1
    assert decode(bytes(data) + crc32(data).to_bytes(4, "little")) is None


@pytest.mark.parametrize("changes", [{"usage": Usage(2**64)}, {"rhythm": ((2**32, 1),)}])
def test_entry_with_impossible_numbers_is_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        encode(entry(**changes))


def test_counted_bytes_are_about_what_memory_an_entry_takes() -> None:
    def make(number: int) -> tuple[str, Entry]:
        headers = tuple((b"x-header-%d" % each, b"%d" % (number + each)) for each in range(8))
        rhythm = tuple((300 + each * 30, 300 + each) for each in range(50))
        body = b"x" * (1000 + number)
        return f"{number:064}", entry(body, headers=headers, rhythm=rhythm)

    tracemalloc.start()
    try:
        kept = dict(make(number) for number in range(200))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = sum(size_of(each) for each in kept.values())
    assert 0.8 * taken < counted < 1.3 * taken


def test_entry_is_of_its_team_and_model() -> None:
    one = entry(team="red", model="m")
    assert is_of(one, None, None)
    assert is_of(one, "red", "m")
    assert not is_of(one, "red", "n")
    assert not is_of(one, "blue", None)
