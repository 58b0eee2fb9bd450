"""A setting for each model: by its name, or by a pattern with `*` and `?`.

The same rules as for the models of a team, with a value behind each entry. `fnmatch` alone gives
brackets a meaning, which are plain characters here: names of models have them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import translate
from typing import Generic, TypeVar

T = TypeVar("T")


class ByModel(Generic[T]):
    """Looks values up by the model's name as the caller wrote it."""

    __slots__ = ("_exact", "_patterns")

    def __init__(self, values: Mapping[str, T]) -> None:
        self._exact = {name: value for name, value in values.items() if not _is_pattern(name)}
        self._patterns = [
            (re.compile(translate(name.replace("[", "[[]"))).match, value)
            for name, value in values.items()
            if _is_pattern(name)
        ]

    def __bool__(self) -> bool:
        return bool(self._exact or self._patterns)

    def find(self, model: str | None) -> T | None:
        """The value under this very name, else under the first pattern that it fits; None: neither,
        or a call that names no model."""
        if model is None:
            return None
        if model in self._exact:
            return self._exact[model]
        for match, value in self._patterns:
            if match(model):
                return value
        return None


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name
