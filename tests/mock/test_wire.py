"""The framing alone; what a client sees of it is tested with the provider."""

import pytest

from sidecar.mock import Settings
from sidecar.mock.content import Answer
from sidecar.mock.script import BEFORE_HEAD
from sidecar.mock.wire import Delivery, Ending, allows_gzip, deliver

STREAM = Answer(
    200, (), "x-request-id", events=(b"one", b"two", b"three"), output_tokens=2, content_start=1
)


def _deliver(settings: Settings, answer: Answer = STREAM) -> Delivery:
    return deliver(answer, settings, allows_gzip=True, is_head=False, is_http10=False)


@pytest.mark.parametrize(
    ("accepted", "allows"),
    [
        ("gzip", True),
        ("br;q=1, GZIP;q=0.5", True),
        ("x-gzip", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("identity", False),
        ("", False),
    ],
)
def test_accept_encoding(accepted: str, allows: bool) -> None:
    assert allows_gzip(accepted) == allows


def test_tokens_follow_the_events() -> None:
    delivery = _deliver(Settings())
    assert [delivery.tokens_after(count) for count in range(4)] == [0, 0, 1, 2]


@pytest.mark.parametrize(("size", "done"), [(4, (1, 2, 3)), (3, (1, 2, 2, 3)), (100, (3,))])
def test_split_knows_which_events_are_out(size: int, done: tuple[int, ...]) -> None:
    assert tuple(_deliver(Settings(split=size)).events_done) == done


def test_error_event_counts_no_token() -> None:
    delivery = _deliver(Settings(error_event=2))
    assert delivery.tokens_after(len(delivery.writes)) == 1
    assert delivery.is_failure


@pytest.mark.parametrize(
    ("settings", "ending", "writes"),
    [
        (Settings(), Ending.DONE, 3),
        (Settings(die=3), Ending.DIE, 3),
        (Settings(hang=0), Ending.HANG, 0),
        (Settings(die=4), Ending.DONE, 3),
        (Settings(die=BEFORE_HEAD), Ending.DIE, 0),
    ],
)
def test_where_a_stream_stops(settings: Settings, ending: Ending, writes: int) -> None:
    delivery = _deliver(settings)
    assert (delivery.ending, len(delivery.writes)) == (ending, writes)
    assert bool(delivery.head) == (settings.die != BEFORE_HEAD)
    assert len(delivery.events_done) >= len(delivery.writes)
    is_ended = any(data.endswith(b"0\r\n\r\n") for data in delivery.writes)
    assert is_ended == (ending is Ending.DONE)


def test_empty_body_is_framed_too() -> None:
    empty = Answer(200, (), "x-request-id")
    assert b"content-length: 0" in _deliver(Settings(), empty).head
    assert _deliver(Settings(body="chunked"), empty).writes == (b"0\r\n\r\n",)
