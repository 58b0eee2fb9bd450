"""Header fields: found without regard to case, kept as bytes, changed only as far as safe."""

from __future__ import annotations

import pytest

from sidecar.headers import Headers, field, lines, sendable_name, sendable_value

RAW = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"latin", b"caf\xe9"), (b"utf8", "é".encode())]


@pytest.fixture
def headers() -> Headers:
    return Headers.of_raw(list(RAW))


def test_fields_are_found_without_regard_to_case(headers: Headers) -> None:
    assert headers["A"] == headers.get("a") == "1"
    assert headers.getall("A") == ["1", "3"]
    assert "B" in headers
    assert "c" not in headers
    assert 1 not in headers
    assert headers.get("c") is None
    assert headers.get("c", "x") == "x"
    assert headers.getall("c") == []
    with pytest.raises(KeyError):
        headers["c"]


def test_fields_are_kept_in_order_with_their_repetitions(headers: Headers) -> None:
    assert list(headers) == ["a", "b", "a", "latin", "utf8"]
    assert len(headers) == 5


def test_untouched_fields_are_the_bytes_that_came(headers: Headers) -> None:
    assert headers.raw() == RAW
    assert lines(headers.raw()) == (b"a: 1\r\nb: 2\r\na: 3\r\nlatin: caf\xe9\r\nutf8: \xc3\xa9\r\n")


def test_bytes_that_are_no_utf8_come_back_as_they_were(headers: Headers) -> None:
    value = headers["latin"]
    other = Headers()
    other["latin"] = value
    assert other.raw() == [(b"latin", b"caf\xe9")]
    assert headers["utf8"] == "é"


def test_setting_replaces_every_field_of_the_name(headers: Headers) -> None:
    headers["A"] = "9"
    assert headers.getall("a") == ["9"]
    assert headers.get("a") == "9"
    assert (b"b", b"2") in headers.raw()


def test_removing_leaves_the_others(headers: Headers) -> None:
    del headers["A"]
    assert "a" not in headers
    assert headers["b"] == "2"
    assert len(headers) == 3
    del headers["never-there"]
    headers["a"] = "new"
    assert headers.getall("a") == ["new"]


def test_popping_returns_the_first_value_and_removes_all(headers: Headers) -> None:
    assert headers.pop("A") == "1"
    assert headers.getall("a") == []
    assert headers.pop("a") is None
    assert headers.pop("a", "x") == "x"


def test_adding_keeps_what_is_there(headers: Headers) -> None:
    headers["b"] = "20"
    headers.add("A", "4")
    headers.add("b", "21")
    assert headers.getall("a") == ["1", "3", "4"]
    assert headers.getall("b") == ["20", "21"]


def test_putting_checked_fields_overrides_and_does_not_share(headers: Headers) -> None:
    fields = dict([field("A", "x")])
    headers.put(fields)
    headers["c"] = "y"
    assert headers.getall("a") == ["x"]
    assert fields == {b"a": b"x"}
    headers.put({b"b": b"z"})
    assert headers["b"] == "z"


def test_updating_sets_each(headers: Headers) -> None:
    headers.update({"A": "x", "c": "y"})
    assert headers.getall("a") == ["x"]
    assert headers["c"] == "y"


@pytest.mark.parametrize("change", ["set", "delete", "add", "put", "original"])
def test_copy_is_independent(change: str, headers: Headers) -> None:
    headers["e"] = "edited"
    copy = headers.copy()
    assert copy == headers
    if change == "set":
        copy["a"] = "x"
    elif change == "delete":
        del copy["e"]
    elif change == "add":
        copy.add("a", "4")
    elif change == "put":
        copy.put({b"a": b"x"})
    else:
        headers["a"] = "x"
        assert copy.getall("a") == ["1", "3"]
        return
    assert headers.raw() == [*RAW, (b"e", b"edited")]
    assert copy != headers


BAD_NAMES = ["", "a b", "a:b", "a\r\nb", "a\0", "é", "漢", "a\tb", '"a"', "a/b", "{a}"]
BAD_VALUES = ["a\r\nb: c", "a\nb", "a\rb", "a\0b", "\r", "\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name_is_refused(name: str, headers: Headers) -> None:
    with pytest.raises(ValueError, match="no header name"):
        headers[name] = "x"
    with pytest.raises(ValueError, match="no header name"):
        headers.add(name, "x")
    with pytest.raises(ValueError, match="no header name"):
        Headers({name: "x"})
    with pytest.raises(ValueError, match="no header name"):
        field(name, "x")
    assert headers.raw() == RAW


@pytest.mark.parametrize("value", BAD_VALUES)
def test_value_that_ends_the_line_is_refused_and_not_shown(value: str, headers: Headers) -> None:
    with pytest.raises(ValueError, match="line end or a NUL") as raised:
        headers["x"] = value
    assert value not in str(raised.value)
    with pytest.raises(ValueError, match="line end or a NUL"):
        headers.add("x", value)
    with pytest.raises(ValueError, match="line end or a NUL"):
        field("x", value)
    assert headers.raw() == RAW


@pytest.mark.parametrize("name", ["Host", "content-length", "transfer-encoding", "connection"])
def test_name_that_frames_a_message_is_not_for_settings(name: str) -> None:
    with pytest.raises(ValueError, match=name.lower()):
        sendable_name(name)


def test_name_and_value_for_settings() -> None:
    assert sendable_name("X-Request-Id") == "x-request-id"
    assert sendable_value("sk-1") == "sk-1"
    with pytest.raises(ValueError, match="no header name"):
        sendable_name("a b")
    with pytest.raises(ValueError, match="line end"):
        sendable_value("a\nb")


def test_repr_shows_names_alone() -> None:
    assert repr(Headers({"authorization": "canary"})) == "<Headers authorization>"


def test_headers_compare_by_their_fields() -> None:
    assert Headers({"A": "1"}) == Headers({"a": "1"})
    assert Headers({"a": "1"}) != Headers({"a": "2"})
    assert Headers() != {}
    with pytest.raises(TypeError):
        hash(Headers())
