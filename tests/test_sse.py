"""The decoder at every cut, and the encoder that it must understand."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.sse import Decoder, Event, EventTooLarge, JsonEvent, encode

Seen = list[tuple[bytes, bytes]]


def decode(pieces: Iterable[bytes]) -> Seen:
    """Name and data of every event, fed in these pieces."""
    decoder = Decoder()
    events: list[Event] = []
    for piece in pieces:
        events += decoder.feed(piece)
    events += decoder.finish()
    return [(event.name, event.data) for event in events]


def cuts(data: bytes) -> Iterable[list[bytes]]:
    """`data` whole, cut at every place, cut at every two places, and byte by byte."""
    yield [data]
    for i in range(len(data) + 1):
        yield [data[:i], data[i:]]
    for i, j in combinations(range(1, len(data)), 2):
        yield [data[:i], data[i:j], data[j:]]
    yield [data[i : i + 1] for i in range(len(data))]


M = b"message"
CASES: dict[str, tuple[bytes, Seen]] = {
    "lf": (b'data: {"a":1}\n\ndata: [DONE]\n\n', [(M, b'{"a":1}'), (M, b"[DONE]")]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [(M, b"a"), (M, b"b")]),
    "cr": (b"data: a\r\rdata: b\r\r", [(M, b"a"), (M, b"b")]),
    "mixed line ends": (
        b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\n",
        [(M, b"a"), (M, b"b"), (M, b"c")],
    ),
    "multi-line data": (b"data: a\ndata:\ndata: c\n\n", [(M, b"a\n\nc")]),
    "named": (b"event: ping\ndata: {}\n\nevent: x\n\n", [(b"ping", b"{}"), (b"x", b"")]),
    "the last name counts": (b"event: a\nevent: b\ndata: 1\n\n", [(b"b", b"1")]),
    "an empty name is none": (b"event:\ndata: 1\n\n", [(M, b"1")]),
    "comments alone": (b": keep-alive\n\n:\n\n: a\n: b\n\ndata: 1\n\n", [(M, b"1")]),
    "comment inside": (b":HTTP_STATUS/200\nid: 1\ndata: 1\n\n", [(M, b"1")]),
    "comment last": (b"data: 1\n:HTTP_STATUS/200\n\n", [(M, b"1")]),
    "no space after the colon": (b"data:a\ndata:  b\n\n", [(M, b"a\n b")]),
    "field without a colon": (b"data\ndata: a\n\n", [(M, b"\na")]),
    "unknown fields": (b"id: 7\nretry: 10\nfoo: bar\ndata: 1\n\n", [(M, b"1")]),
    "names alike": (b"database: 1\nevents: 2\ndata: 3\n\n", [(M, b"3")]),
    "byte order mark": (b"\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [(M, b"1"), (M, b"2")]),
    "a mark later is data": (
        b"data: 1\n\ndata: \xef\xbb\xbf2\n\n",
        [(M, b"1"), (M, b"\xef\xbb\xbf2")],
    ),
    "utf-8": ("data: é漢😀\n\n".encode(), [(M, "é漢😀".encode())]),
    "no data": (b"event: ping\n\nid: 1\n\n", [(b"ping", b""), (M, b"")]),
    "further blank lines": (b"\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n\n", [(M, b"1"), (M, b"2")]),
    "end without a blank line": (b"data: 1\n\ndata: 2", [(M, b"1"), (M, b"2")]),
    "end after one line end": (b"data: 1\r\n", [(M, b"1")]),
    "end inside a line end": (b"data: 1\r\n\r", [(M, b"1")]),
    "end in a comment": (b"data: 1\n\n: bye", [(M, b"1")]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize("case", CASES)
def test_events_are_the_same_wherever_the_bytes_are_cut(case: str) -> None:
    data, expected = CASES[case]
    for pieces in cuts(data):
        assert decode(pieces) == expected, pieces


def test_event_comes_with_the_piece_that_completes_it() -> None:
    decoder = Decoder()
    assert not decoder.feed(b"data: 1\n")
    (event,) = decoder.feed(b"\ndata: 2")
    assert event.data == b"1"
    (event,) = decoder.feed(b"\n\n")
    assert event.data == b"2"


def test_json_is_read_once_and_none_when_it_is_none() -> None:
    event = Event(b'data: {"a": [1]}')
    assert event.json() == {"a": [1]}
    assert event.json() is event.json()
    assert Event(b"data: [DONE]").json() is None
    assert Event(b"event: ping").json() is None
    assert JsonEvent(b'{"data": 1}').json() == {"data": 1}
    assert JsonEvent(b'{"event": 1}').name == b"message"
    assert JsonEvent(b"{}").data == b"{}"


def test_repr_tells_name_and_size_but_no_data() -> None:
    assert repr(Event(b"event: delta\ndata: secret")) == "<Event delta 6 B>"


# Bounds


def test_event_larger_than_the_bound_is_refused() -> None:
    decoder = Decoder(max_event_bytes=100)
    for _ in range(10):
        decoder.feed(b"0123456789")
    with pytest.raises(EventTooLarge):
        decoder.feed(b"0")


def test_bound_is_for_one_event_not_for_the_stream() -> None:
    decoder = Decoder(max_event_bytes=100)
    for _ in range(50):
        assert len(decoder.feed(b"data: 0123456789\n\ndata: 01234")) == 1
        assert len(decoder.feed(b"56789\n\n")) == 1


def test_event_as_large_as_the_bound_passes() -> None:
    decoder = Decoder(max_event_bytes=100)
    decoder.feed(b"data: " + b"x" * 94)
    (event,) = decoder.feed(b"\n\n")
    assert len(event.data) == 94


class CountingBytes(bytes):
    """Bytes that count how many of them were searched, split or copied by name."""

    touched = 0

    def __contains__(self, other: object) -> bool:
        CountingBytes.touched += len(self)
        return super().__contains__(other)  # type: ignore[operator]

    def split(self, *args: object) -> list[bytes]:
        CountingBytes.touched += len(self)
        return super().split(*args)  # type: ignore[arg-type]


def touched_by(size: int) -> int:
    """How many bytes the decoder looked at for one event of `size` bytes in pieces of 1 KiB."""
    CountingBytes.touched = 0
    decoder = Decoder(max_event_bytes=2 * size)
    piece = CountingBytes(b"x" * 1024)
    assert not decoder.feed(b"data: ")
    for _ in range(size // 1024):
        assert not decoder.feed(piece)
    held = decoder._pieces
    assert sum(map(len, held)) == size + 6
    assert len(held) == size // 1024 + 1  # as they came: nothing was joined on the way
    (event,) = decoder.feed(CountingBytes(b"\n\n"))
    assert len(event.data) == size
    return CountingBytes.touched


def test_time_is_linear_in_the_size_of_an_event() -> None:
    small, large = touched_by(256 * 1024), touched_by(8 * 1024 * 1024)
    assert large <= 33 * small


# Encoding

LINES = st.binary(max_size=40).map(lambda data: data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
NAMES = st.one_of(st.none(), st.from_regex(r"[a-z_.]{1,12}", fullmatch=True))


@settings(deadline=None)
@given(st.lists(st.tuples(LINES, NAMES), max_size=5), st.data())
def test_what_is_encoded_is_decoded_again_in_any_pieces(
    events: list[tuple[bytes, str | None]], data: st.DataObject
) -> None:
    stream = b"".join(encode(each, name) for each, name in events)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    ends = [0, *places, len(stream)]
    pieces = [stream[i:j] for i, j in pairwise(ends)]
    expected = [((name or "message").encode(), each) for each, name in events]
    assert decode(pieces) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([b"data: a", b"data", b":", b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"x"])
    ),
    st.data(),
)
def test_any_bytes_in_any_pieces_give_the_same_as_in_one(
    tokens: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(tokens)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    ends = [0, *places, len(stream)]
    pieces = [stream[i:j] for i, j in pairwise(ends)]
    assert decode(pieces) == decode([stream])


def test_line_ends_inside_of_data_become_further_lines() -> None:
    assert encode(b"a\r\nb\rc\nd") == b"data: a\ndata: b\ndata: c\ndata: d\n\n"
    assert encode(b"{}", "error") == b"event: error\ndata: {}\n\n"
    assert encode(b"") == b"data: \n\n"


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"choices":[],"usage":{"n":1}}', {"n": 1}),
        (b'{"usage":{"n":1},"id":"x"} ', {"n": 1}),
        (b'{"a":{"usage":{"n":2}},"usage":{"n":1}}', {"n": 1}),
        (b'{"usage":{"n":1},"a":{"usage":{"n":2}}}', None),  # stands deeper: `json` knows
        (b'{"response":{"usage":{"n":1}}}', None),
        (b'[{"usage":{"n":1}}]', None),
        (b'{"text":"say \\"usage\\": {}","id":1}', None),
        (b'{"type":"usage"}', None),
        (b'{"usage":{"n":1}', None),
        (b"[DONE]", None),
    ],
)
def test_last_field_is_found_only_in_the_outermost_object(data: bytes, value: object) -> None:
    assert JsonEvent(data).last_field(b"usage") == value
    assert Event(b"data: " + data).last_field(b"usage") == value
