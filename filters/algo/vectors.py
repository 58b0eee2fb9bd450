"""Vectors of length 1 and what belongs to each, and which of them are nearest to another one.

Vectors are compared inside of their group alone. There are never more than so many entries and so
many bytes; the one unused for longest goes first, and each has its own end. Times are the caller's;
any clock.

The search is exact, one dot product for each vector of the group: 65 µs for 1,000 vectors of 1,536
dimensions, 145 µs for 3,072. faiss, hnswlib and usearch find approximately among millions; among
thousands their graphs cost more than they spare, and are slow to take a vector out. BLAS would take
two thirds of the time, but on threads of its own, which keep other cores busy: `vecdot` uses none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import isfinite
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

V = TypeVar("V")

Vector: TypeAlias = NDArray[np.float32]

MAX_DIMENSIONS = 16_384
"""No model's embeddings have more: the largest known have 8,192."""
LEAST_ROWS = 4
"""A group has room for so many."""
VECTOR_BYTES = 500
"""What an entry takes besides vector and value: its places in the tables, its part of the group.
(Measured on CPython 3.11.)"""


def unit(numbers: object) -> Vector | None:
    """`numbers` as a vector of length 1; None when they are none: no list of numbers, not finite,
    all of them 0."""
    if type(numbers) is not list or not 0 < len(numbers) <= MAX_DIMENSIONS:
        return None
    if not {float, int}.issuperset(map(type, numbers)):
        return None
    wide = np.array(numbers, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        largest = float(np.max(np.abs(wide)))
        if not isfinite(largest) or largest == 0.0:
            return None
        wide /= largest  # or the squares of tiny ones would be nothing, of huge ones too much
        return (wide / np.sqrt(np.vecdot(wide, wide))).astype(np.float32)  # type: ignore[no-any-return]


class Match(NamedTuple, Generic[V]):
    """An entry that was found."""

    similarity: float
    """The cosine of the angle between the two vectors, from -1 to 1."""
    key: str
    value: V


class _Kept(Generic[V]):
    __slots__ = ("due", "group", "row", "size", "value")

    def __init__(self, value: V, size: int, due: float, group: str, row: int) -> None:
        self.value = value
        self.size = size
        self.due = due
        self.group = group
        self.row = row


class VectorIndex(Generic[V]):
    """Values by key, each with a vector in a group."""

    __slots__ = ("_groups", "_kept", "bytes", "max_bytes", "max_entries")

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.bytes = 0
        """Of all entries, those whose time has come included until they are met or have to go."""
        self._kept: OrderedDict[str, _Kept[V]] = OrderedDict()  # the longest unused one first
        self._groups: dict[str, _Group] = {}

    def nearest(self, group: str, vector: Vector, now: float, limit: int = 1) -> list[Match[V]]:
        """The entries of the group that are most like `vector`, a unit vector; the nearest first.
        None of another dimension is."""
        rows = self._groups.get(group)
        if rows is None:
            return []
        kept = self._kept
        for key in [key for key in rows.keys if kept[key].due <= now]:
            self.pop(key)
        if not rows.keys or len(vector) != rows.dimensions:
            return []
        cosines = rows.cosines(vector)
        best = np.argpartition(cosines, -limit)[-limit:] if limit < len(cosines) else None
        found = [
            Match(float(cosines[row]), key := rows.keys[row], kept[key].value)
            for row in (range(len(cosines)) if best is None else best.tolist())
        ]
        found.sort(key=lambda match: -match.similarity)
        return found

    def use(self, key: str) -> None:
        """This one was used last."""
        if key in self._kept:
            self._kept.move_to_end(key)

    def put(
        self, key: str, group: str, vector: Vector, value: V, size: int, due: float, now: float
    ) -> int:
        """Keep `value`, of `size` bytes, under a unit vector until `due`, in place of what `key`
        had; how many others had to go before their time.

        The vectors of a group have one dimension: when another one comes, whoever makes them has
        changed, and those that are there can match no more. They go.
        """
        self.pop(key)
        size += VECTOR_BYTES + vector.nbytes
        if size > self.max_bytes or due <= now or self.max_entries < 1:
            return 0
        rows = self._groups.get(group)
        if rows is not None and rows.dimensions != len(vector):
            for each in tuple(rows.keys):
                self.pop(each)
        evicted = 0
        while self.bytes + size > self.max_bytes or len(self._kept) >= self.max_entries:
            oldest = next(iter(self._kept))
            evicted += self._kept[oldest].due > now
            self.pop(oldest)
        rows = self._groups.get(group)
        if rows is None:
            rows = self._groups[group] = _Group(len(vector))
        self._kept[key] = _Kept(value, size, due, group, rows.add(key, vector))
        self.bytes += size
        return evicted

    def peek(self, key: str) -> V | None:
        """The value, whatever the time, and without being used."""
        kept = self._kept.get(key)
        return None if kept is None else kept.value

    def pop(self, key: str) -> V | None:
        """Forget the value, and give it."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return None
        self.bytes -= kept.size
        rows = self._groups[kept.group]
        moved = rows.remove(kept.row)
        if moved is not None:
            self._kept[moved].row = kept.row
        if not rows.keys:
            del self._groups[kept.group]
        return kept.value

    def keys(self) -> Sequence[str]:
        """The longest unused one first."""
        return list(self._kept)

    def clear(self) -> None:
        self._kept.clear()
        self._groups.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        groups = len(self._groups)
        return f"<VectorIndex entries={len(self._kept)} groups={groups} bytes={self.bytes}>"


class _Group:
    """The vectors of one group as the rows of a matrix, without gaps."""

    __slots__ = ("_matrix", "dimensions", "keys")

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.keys: list[str] = []  # by row
        self._matrix: NDArray[np.float32] = np.empty((LEAST_ROWS, dimensions), np.float32)

    def cosines(self, vector: Vector) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.vecdot(self._matrix[: len(self.keys)], vector)
        return found

    def add(self, key: str, vector: Vector) -> int:
        row = len(self.keys)
        if row == len(self._matrix):
            self._resize(2 * row)
        self._matrix[row] = vector
        self.keys.append(key)
        return row

    def remove(self, row: int) -> str | None:
        """Fill the row with the last one; whose that is now."""
        last = self.keys.pop()
        count = len(self.keys)
        if row < count:
            self._matrix[row] = self._matrix[count]
            self.keys[row] = last
        if len(self._matrix) > LEAST_ROWS and 4 * count <= len(self._matrix):
            self._resize(len(self._matrix) // 2)
        return last if row < count else None

    def _resize(self, rows: int) -> None:
        matrix = np.empty((rows, self.dimensions), np.float32)
        matrix[: len(self.keys)] = self._matrix[: len(self.keys)]
        self._matrix = matrix
