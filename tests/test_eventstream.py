"""Amazon's event streams, cut anywhere, held against published frames and botocore's decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from struct import pack
from typing import Any
from uuid import UUID
from zlib import crc32

import pytest
from botocore.eventstream import EventStreamBuffer
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import SidecarError
from sidecar.eventstream import BadMessage, Decoder, HeaderValue, Message
from tests.support.vectors import vectors_of

VECTORS = vectors_of("aws-eventstream-frame")
CHUNK, METADATA, THROTTLED = (bytes.fromhex(each["frame_hex"]) for each in VECTORS)

TYPES = ("true", "false", "int8", "int16", "int32", "int64", "bytes", "string", "time", "uuid")
FORMATS = {"int8": ">b", "int16": ">h", "int32": ">i", "int64": ">q", "time": ">q"}


def header(name: str, kind: str, value: HeaderValue) -> bytes:
    raw = name.encode()
    return bytes([len(raw)]) + raw + bytes([TYPES.index(kind)]) + encoded(kind, value)


def encoded(kind: str, value: Any) -> bytes:
    if kind in ("true", "false"):
        return b""
    if kind in FORMATS:
        return pack(FORMATS[kind], value)
    if kind == "uuid":
        found: bytes = value.bytes
        return found
    raw: bytes = value.encode() if kind == "string" else value
    return pack(">H", len(raw)) + raw


def frame(
    headers: bytes, payload: bytes = b"", *, total: int | None = None, length: int | None = None
) -> bytes:
    """A message with good checksums, also where `total` or the headers' `length` is wrong."""
    size = 16 + len(headers) + len(payload)
    prelude = pack(
        ">II", size if total is None else total, len(headers) if length is None else length
    )
    start = prelude + pack(">I", crc32(prelude)) + headers + payload
    return start + pack(">I", crc32(start))


def decode(pieces: Iterable[bytes]) -> list[Message]:
    decoder = Decoder()
    messages = [message for piece in pieces for message in decoder.feed(piece)]
    decoder.finish()
    return messages


def shown(messages: Iterable[Message]) -> list[tuple[Mapping[str, HeaderValue], bytes, int]]:
    return [(each.headers, each.payload, each.total_length) for each in messages]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    return [data[i:j] for i, j in pairwise([0, *sorted(places), len(data)])]


# Published frames


@pytest.mark.parametrize("vector", VECTORS, ids=lambda each: each["id"])
def test_vector_is_read_wherever_its_bytes_are_cut(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame_hex"])
    expected = vector["expected"]
    message = (
        expected["headers"],
        bytes.fromhex(expected["payload_hex"]),
        expected["total_length"],
    )
    for place in range(len(data) + 1):
        assert shown(decode(cut(data, [place]))) == [message]
    assert shown(decode(bytes([each]) for each in data)) == [message]


def test_feed_gives_every_message_it_completes() -> None:
    stream = CHUNK + METADATA + THROTTLED
    expected = shown(decode([CHUNK]) + decode([METADATA]) + decode([THROTTLED]))
    assert shown(Decoder().feed(stream)) == expected
    for place in range(len(stream) + 1):
        assert shown(decode(cut(stream, [place]))) == expected


def test_message_comes_with_the_piece_that_completes_it() -> None:
    decoder = Decoder()
    assert not decoder.feed(CHUNK[:-1])
    (message,) = decoder.feed(CHUNK[-1:] + METADATA[:11])
    assert message.event_type == "chunk"
    assert not decoder.feed(b"")
    (message,) = decoder.feed(METADATA[11:])
    assert message.event_type == "metadata"
    decoder.finish()


def test_message_tells_what_it_is() -> None:
    chunk, metadata, throttled = decode([CHUNK + METADATA + THROTTLED])
    assert (chunk.is_exception, chunk.event_type) == (False, "chunk")
    assert (metadata.is_exception, metadata.event_type) == (False, "metadata")
    assert (throttled.is_exception, throttled.event_type) == (True, "throttlingException")


def test_error_that_the_service_does_not_model_is_an_exception_too() -> None:
    headers = header(":message-type", "string", "error")
    headers += header(":error-code", "string", "InternalError")
    headers += header(":error-message", "string", "sorry")
    (message,) = decode([frame(headers)])
    assert message.is_exception
    assert message.event_type == "InternalError"
    assert message.headers[":error-message"] == "sorry"


def test_message_without_any_header_is_no_exception() -> None:
    (message,) = decode([frame(b"")])
    assert shown([message]) == [({}, b"", 16)]
    assert not message.is_exception
    assert message.event_type == ""


def test_event_type_that_is_no_text_is_none() -> None:
    (message,) = decode([frame(header(":event-type", "int8", 1))])
    assert message.event_type == ""


def test_repr_tells_type_and_size_but_no_payload() -> None:
    assert [repr(each) for each in decode([METADATA + THROTTLED])] == [
        "<Message metadata 141 B>",
        "<Message exception throttlingException 65 B>",
    ]


# Headers of every type

ALL_TYPES: list[tuple[str, HeaderValue]] = [
    ("true", True),
    ("false", False),
    ("int8", -128),
    ("int16", -32768),
    ("int32", -(2**31)),
    ("int64", 2**63 - 1),
    ("bytes", b"\x00\xff"),
    ("string", "é漢😀"),
    ("time", 1719820800123),
    ("uuid", UUID("01234567-89ab-cdef-0123-456789abcdef")),
]


def test_headers_of_all_types_are_read() -> None:
    block = b"".join(header(f"a-{kind}", kind, value) for kind, value in ALL_TYPES)
    (message,) = decode([frame(block, b"{}")])
    assert message.headers == {f"a-{kind}": value for kind, value in ALL_TYPES}
    assert [type(each) for each in message.headers.values()] == [
        *(bool, bool, int, int, int, int, bytes, str, int, UUID)
    ]


def integers(bits: int) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


TYPED = st.one_of(
    st.just(("true", True)),
    st.just(("false", False)),
    *(st.tuples(st.just(f"int{bits}"), integers(bits)) for bits in (8, 16, 32, 64)),
    st.tuples(st.just("bytes"), st.binary(max_size=40)),
    st.tuples(st.just("string"), st.text(st.characters(codec="utf-8"), max_size=20)),
    st.tuples(st.just("time"), integers(64)),
    st.tuples(st.just("uuid"), st.uuids()),
)
HEADERS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), TYPED, max_size=6)
FRAMES = st.builds(
    lambda headers, payload: frame(
        b"".join(header(name, *typed) for name, typed in headers.items()), payload
    ),
    HEADERS,
    st.binary(max_size=60),
)


def as_botocore(value: HeaderValue) -> HeaderValue:
    return value.bytes if isinstance(value, UUID) else value


@settings(deadline=None)
@given(st.lists(FRAMES, max_size=4), st.data())
def test_botocore_reads_any_frames_in_any_pieces_alike(
    frames: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(frames)
    theirs = EventStreamBuffer()
    theirs.add_data(stream)
    expected = [(each.headers, each.payload, each.prelude.total_length) for each in theirs]
    assert len(expected) == len(frames)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    ours = decode(cut(stream, places))
    assert [
        ({name: as_botocore(value) for name, value in each.headers.items()}, *rest)
        for each, *rest in ((each, each.payload, each.total_length) for each in ours)
    ] == expected


# Bytes that are no message


def refused(data: bytes, max_message_bytes: int = 1024) -> str:
    """Why `data` is refused: the same in one piece and byte by byte."""
    reasons = set()
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        decoder = Decoder(max_message_bytes)
        try:
            for piece in pieces:
                decoder.feed(piece)
        except BadMessage as error:
            reasons.add(str(error))
    (reason,) = reasons
    return reason


def test_bad_message_is_an_error_of_ours() -> None:
    assert issubclass(BadMessage, SidecarError)


@pytest.mark.parametrize("frame_hex", [each["frame_hex"] for each in VECTORS], ids=["1", "2", "3"])
def test_no_altered_byte_goes_unseen(frame_hex: str) -> None:
    data = bytearray.fromhex(frame_hex)
    for place in range(len(data)):
        data[place] ^= 0x10
        with pytest.raises(BadMessage, match="checksum"):
            Decoder().feed(bytes(data))
        data[place] ^= 0x10
    assert len(Decoder().feed(bytes(data))) == 1


def test_altered_length_is_seen_before_the_message_is_waited_for() -> None:
    with pytest.raises(BadMessage, match="lengths do not match"):
        Decoder().feed(b"\x00\xff" + CHUNK[2:12])


A = header("a", "true", True)

BROKEN = {
    "no room for the checksum": (frame(A, total=15, length=0), "shorter than its headers"),
    "no length at all": (frame(b"", total=0), "shorter than its headers"),
    "headers longer than the message": (frame(A, length=len(A) + 1), "shorter than its headers"),
    "headers of four gigabytes": (frame(A, length=2**32 - 1), "headers are larger"),
    "message of four gigabytes": (frame(A, total=2**32 - 1), "larger than 1024"),
    "length too small for what follows": (frame(A, b"1234", total=20), "checksum"),
    "unknown type": (frame(b"\x01a\x0a"), "unknown type 10"),
    "name beyond the headers": (frame(b"\x05abcd"), "name is longer"),
    "name without a type": (frame(b"\x01a"), "name is longer"),
    "length alone": (frame(b"\x01"), "name is longer"),
    "string without a length": (frame(b"\x01a\x07"), "value is longer"),
    "string with half a length": (frame(b"\x01a\x07\x00"), "value is longer"),
    "truncated string": (frame(b"\x01a\x07\x00\x03ab"), "value is longer"),
    "truncated bytes": (frame(b"\x01a\x06\x00\x01"), "value is longer"),
    "truncated number": (frame(b"\x01a\x05\x00\x00"), "value is longer"),
    "truncated uuid": (frame(b"\x01a\x09" + b"\x00" * 15), "value is longer"),
    "value that is no text": (frame(b"\x01a\x07\x00\x01\xff"), "UTF-8"),
    "name that is no text": (frame(b"\x01\xff\x00"), "UTF-8"),
    "header twice": (frame(A + A), "comes twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_message_is_refused(case: str) -> None:
    data, reason = BROKEN[case]
    assert reason in refused(data)


@pytest.mark.parametrize("length", [*range(1, 12), 12, 100, len(CHUNK) - 1])
def test_stream_that_ends_inside_a_message_is_told(length: int) -> None:
    decoder = Decoder()
    decoder.feed(METADATA + CHUNK[:length])
    with pytest.raises(BadMessage, match=f"ended {length} bytes into"):
        decoder.finish()


def test_stream_without_any_message_ends_well() -> None:
    Decoder().finish()
    assert decode([b"", b""]) == []


# Bounds


def test_message_as_large_as_the_bound_passes_and_one_byte_more_does_not() -> None:
    whole = frame(A, b"x" * (1024 - 16 - len(A)))
    assert len(whole) == 1024
    assert len(Decoder(1024).feed(whole)) == 1
    assert "larger than 1023" in refused(whole[:12], max_message_bytes=1023)


def test_bound_is_for_one_message_not_for_the_stream() -> None:
    decoder = Decoder(max_message_bytes=len(METADATA))
    for _ in range(20):
        assert len(decoder.feed(METADATA + CHUNK[:100])) == 1
        assert len(decoder.feed(CHUNK[100:] + THROTTLED)) == 2


def test_largest_message_of_the_format_passes() -> None:
    block = b"".join(header(name, "bytes", b"x" * (64 * 1024 - 5)) for name in "ab")
    assert len(block) == 128 * 1024
    payload = bytes(24 * 1024 * 1024)
    whole = frame(block, payload)
    decoder = Decoder()
    messages = [
        message
        for start in range(0, len(whole), 256 * 1024)
        for message in decoder.feed(whole[start : start + 256 * 1024])
    ]
    assert [each.total_length for each in messages] == [len(whole)]
    assert messages[0].payload == payload


def test_payload_larger_than_the_format_has_is_refused() -> None:
    prelude = pack(">II", 24 * 1024 * 1024 + 128 * 1024 + 17, 0)
    with pytest.raises(BadMessage, match="larger than"):
        Decoder().feed(prelude + pack(">I", crc32(prelude)))


def test_headers_larger_than_the_format_has_are_refused() -> None:
    prelude = pack(">II", 1024 * 1024, 128 * 1024 + 1)
    with pytest.raises(BadMessage, match="headers are larger than 131072"):
        Decoder().feed(prelude + pack(">I", crc32(prelude)))
