"""Header fields that are written as the very bytes that came, unless somebody changes them.

Most heads pass through untouched, and then a field should cost neither a decode nor a copy. Changes
are kept beside the original fields and checked when they are made, so that writing needs no check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

RawFields = list[tuple[bytes, bytes]]

NEVER_SET = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "host", "content-length", "expect"),
    }
)
"""Fields that are made for each message or connection (RFC 9110, 7.6.1; RFC 9112, 6)."""

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+").fullmatch  # RFC 9110, 5.1: token, lower case
_BAD_VALUE = re.compile(rb"[\r\n\0]").search


class Headers:
    """Fields in order, found by name without regard to case; a name may come more than once.

    Values are text: UTF-8, with bytes that are none kept as surrogates. Setting one raises
    ValueError when name or value could end the line.
    """

    __slots__ = ("_edits", "_raw")

    def __init__(self, fields: Iterable[tuple[str, str]] | Mapping[str, str] = ()) -> None:
        self._raw: RawFields = []
        self._edits: dict[bytes, bytes | None] | None = None  # None: removed
        for name, value in fields.items() if isinstance(fields, Mapping) else fields:
            self.add(name, value)

    @classmethod
    def of_raw(cls, raw: RawFields) -> Headers:
        """Fields as a parser found them: names in lower case, nothing in them that ends a line."""
        headers = cls.__new__(cls)
        headers._raw = raw
        headers._edits = None
        return headers

    # Reading

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value of `name`."""
        key = _key(name)
        if self._edits is not None and key in self._edits:
            value = self._edits[key]
            return default if value is None else value.decode("utf-8", "surrogateescape")
        for each, value in self._raw:
            if each == key:
                return value.decode("utf-8", "surrogateescape")
        return default

    def getall(self, name: str) -> list[str]:
        """Every value of `name`, in order."""
        key = _key(name)
        return [
            value.decode("utf-8", "surrogateescape") for each, value in self.raw() if each == key
        ]

    def __getitem__(self, name: str) -> str:
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in self.items()])

    def __len__(self) -> int:
        return len(self.raw())

    def items(self) -> list[tuple[str, str]]:
        return [
            (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
            for name, value in self.raw()
        ]

    def raw(self) -> RawFields:
        """The fields as bytes, changes applied."""
        edits = self._edits
        if edits is None:
            return self._raw
        fields = [field for field in self._raw if field[0] not in edits]
        fields += [(name, value) for name, value in edits.items() if value is not None]
        return fields

    # Changing

    def __setitem__(self, name: str, value: str) -> None:
        """Put `value` in place of all that `name` had."""
        if self._edits is None:
            self._edits = {}
        self._edits[_checked_name(name)] = _checked_value(value)

    def __delitem__(self, name: str) -> None:
        if self._edits is None:
            self._edits = {}
        self._edits[_key(name)] = None

    def pop(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name, default)
        del self[name]
        return value

    def add(self, name: str, value: str) -> None:
        """One more field, beside those that `name` has."""
        field = (_checked_name(name), _checked_value(value))
        self._raw = [*self.raw(), field]
        self._edits = None

    def put(self, fields: Mapping[bytes, bytes]) -> None:
        """Set fields that `field` has checked."""
        if self._edits is None:
            self._edits = dict(fields)
        else:
            self._edits.update(fields)

    def update(self, fields: Mapping[str, str]) -> None:
        for name, value in fields.items():
            self[name] = value

    def copy(self) -> Headers:
        copy = Headers.of_raw(self._raw)
        copy._edits = None if self._edits is None else dict(self._edits)
        return copy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headers) and self.raw() == other.raw()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Headers {', '.join(self)}>"  # names only: values may be secret


@lru_cache(maxsize=1024)
def _key(name: str) -> bytes:
    return name.lower().encode("latin-1", "replace")


@lru_cache(maxsize=1024)
def _checked_name(name: str) -> bytes:
    key = _key(name)
    if not _NAME(key):
        raise ValueError(f"{name!r} is no header name")
    return key


def _checked_value(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    if _BAD_VALUE(data):
        raise ValueError("a header value holds a line end or a NUL")
    return data


def field(name: str, value: str) -> tuple[bytes, bytes]:
    """A field to `put`; raises ValueError when name or value could end the line."""
    return _checked_name(name), _checked_value(value)


def sendable_name(name: str) -> str:
    """`name` in lower case, if a message may carry it; ValueError otherwise, also for the fields
    that frame the message or belong to one connection."""
    key = _checked_name(name).decode()
    if key in NEVER_SET:
        raise ValueError(f'"{key}" is set for each message: choose another header')
    return key


def sendable_value(value: str) -> str:
    """`value`, if a field may carry it; ValueError otherwise, which does not show it."""
    _checked_value(value)
    return value


def lines(fields: RawFields) -> bytes:
    """The fields as lines of a head."""
    return b"".join([b"%b: %b\r\n" % field for field in fields])
