"""Secrets that are known by name, and the search for them in what must not show any."""

from __future__ import annotations

import functools
import gc
import random
import types
from base64 import b64encode, urlsafe_b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

LETTERS = "ghjkmnpqrstvwxz"
"""No hex digits and no vowels: a core is part of no digest and no word."""


class Canaries:
    """Makes secrets and finds them again: as they are, encoded, and halves of them."""

    def __init__(self) -> None:
        self.between = "+"
        """What stands between the halves of a new secret."""
        self.values: dict[str, str] = {}
        self._forms: list[tuple[str, str]] = []

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def make(self, name: str) -> str:
        """A new secret. It holds characters that every encoding changes; the same each run."""
        letters = random.Random(name)
        first, second = ("".join(letters.choices(LETTERS, k=12)) for _ in range(2))
        return self.add(name, f"{first}{self.between}{second}=")

    def add(self, name: str, value: str) -> str:
        """Take `value`, which somebody else has made, for a secret."""
        assert name not in self.values, name
        self.values[name] = value
        self._forms += [(name, form) for form in sorted(forms(value))]
        return value

    def found_in(self, text: str | bytes) -> set[str]:
        """The names of the secrets that `text` shows."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        return {name for name, form in self._forms if form in text}

    def leaks(self, sinks: Mapping[str, str | bytes]) -> list[str]:
        """Which sink shows which secret; all sinks must hold something."""
        empty = [sink for sink, text in sinks.items() if not text]
        assert not empty, f"nothing was looked at in {empty}"
        return [f"{sink}: {name}" for sink in sinks for name in sorted(self.found_in(sinks[sink]))]


def forms(value: str) -> set[str]:
    """`value` as it may stand somewhere."""
    data = value.encode("utf-8", "surrogateescape")
    found = {value, quote(data, safe=""), data.hex(), data.decode("latin-1"), repr(value)[1:-1]}
    for encode in (b64encode, urlsafe_b64encode):
        for before in range(3):
            # Within longer text: the characters that depend on these bytes alone.
            text = encode(bytes(before) + data).decode()
            found.add(text[-(-before * 8 // 6) : (before + len(data)) * 8 // 6])
    if len(value) >= 24:
        found |= {value[:12], value[-12:]}  # cut off, or with its middle hidden
    return found


# What live objects say of themselves


def objects_of(root: object, packages: Iterable[str]) -> Iterator[Any]:
    """`root` and every object of a class of `packages` that it leads to, each once.

    The way leads through plain containers, bound methods, closures and partials.
    """
    prefixes = tuple(f"{package}." for package in packages)
    seen: dict[int, object] = {}  # the objects themselves, so that no id is used again
    left = deque([root])
    while left:
        each = left.popleft()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, type | types.ModuleType):
            continue
        is_ours = f"{type(each).__module__}.".startswith(prefixes)
        if is_ours:
            yield each
        if isinstance(each, types.FunctionType):
            left.extend([each.__closure__, each.__defaults__, each.__kwdefaults__])
        elif is_ours or isinstance(each, _PASSABLE):
            left.extend(gc.get_referents(each))


_PASSABLE = (
    *(dict, list, tuple, set, frozenset, deque, types.MappingProxyType),
    *(types.MethodType, types.CellType, functools.partial),
)
