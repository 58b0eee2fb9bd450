"""One YAML file as plain values, with the line and column of each.

YAML 1.2 core scalars, built straight from libyaml's events: the stock loader would read `12:30`
as 750, `on` as true and `010` as 8, keep the last of two equal keys, and follow aliases without
end. What the values mean is left to `schema.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sidecar.errors import ConfigError, Problem

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Values of one file, each alias counted with everything it stands for."""

ALIAS_OF_NOTHING = "this alias stands for nothing yet: write text that begins with * in quotes"
"""Without its name, which may be the beginning of a secret."""

Keys = tuple[str | int, ...]
"""The way to a value: keys of mappings and indexes of lists."""


def dotted(keys: Keys) -> str:
    """`("models", "gpt-4.1", "targets", 0)` as `models["gpt-4.1"].targets[0]`."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        elif re.fullmatch(r"[\w-]+", key):
            text += f".{key}" if text else key
        else:
            text += f'["{key}"]'
    return text


def follow(keys: Keys, value: Any) -> tuple[Keys, Any]:
    """Those of `keys` that lead on into `value`, and what is there; the others are left out.

    So the location of a target leads to it whether the file has the long form or a shorthand.
    """
    found: list[str | int] = []
    for key in keys:
        if isinstance(value, dict):
            is_there = key in value
        else:
            is_there = isinstance(value, list) and isinstance(key, int) and key < len(value)
        if not is_there:
            continue
        value = value[key]
        found.append(key)
    return tuple(found), value


@dataclass(frozen=True, slots=True)
class Document:
    """The values of one file. `places` are (line, column) pairs that count from 1."""

    file: str
    value: Any = field(default=None, repr=False)
    places: Mapping[Keys, tuple[int, int]] = field(default_factory=dict, repr=False)
    key_places: Mapping[Keys, tuple[int, int]] = field(default_factory=dict, repr=False)

    def problem(self, keys: Keys, message: str, *, at_key: bool = False) -> Problem:
        """A problem of the value under `keys`, or of its key.

        What stands nowhere (a default, a part of a shorthand, the inside of an alias) is shown
        where the nearest thing around it stands.
        """
        line, column = self._place(keys, at_key)
        return Problem(self.file, line, column, dotted(keys), message)

    def _place(self, keys: Keys, at_key: bool) -> tuple[int, int]:
        if at_key and keys in self.key_places:
            return self.key_places[keys]
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, (0, 0))


def read(path: Path) -> bytes:
    """The content of a configuration file. Raises ConfigError, also for one over 1 MiB."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no possible path"
        raise ConfigError([Problem(str(path), 0, 0, "", f"cannot be read: {reason}")]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([Problem(str(path), 0, 0, "", "is larger than 1 MiB")])
    return content


def parse(file: str, content: bytes) -> tuple[Document, list[Problem]]:
    """The document in `content`, and everything that YAML allows and we do not.

    Raises ConfigError when the rest of the file cannot be understood after a mistake.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_and_column(content[: error.start].decode(errors="replace"))
        raise ConfigError([Problem(file, line, column, "", "is not UTF-8 text")]) from None
    builder = _Builder(file, yaml.parse(text, Loader=yaml.CSafeLoader))
    mistake: Problem
    try:
        return builder.document(), builder.problems
    except yaml.reader.ReaderError as error:
        line, column = _line_and_column(text.encode()[: error.position].decode(errors="replace"))
        mistake = Problem(file, line, column, "", f"is not YAML: {error.reason}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        place = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        mistake = Problem(file, *place, "", f"is not YAML: {reason}")
    raise ConfigError([*builder.problems, mistake])


def _line_and_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


class _Builder:
    """Turns events into values; notes where each stands and what is refused."""

    def __init__(self, file: str, events: Iterator[Any]) -> None:
        self.file = file
        self.events = events
        self.problems: list[Problem] = []
        self.places: dict[Keys, tuple[int, int]] = {}
        self.key_places: dict[Keys, tuple[int, int]] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0

    def document(self) -> Document:
        next(self.events)  # the stream's start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            raise ConfigError([Problem(self.file, 0, 0, "", "is empty")])
        value = self._value(next(self.events), ())
        next(self.events)  # the document's end
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._problem(event, (), "a second document: a file holds one; remove the `---`")
        return Document(self.file, value, self.places, self.key_places)

    def _value(self, event: Any, keys: Keys) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._refused(event, keys, f"the file holds more than {MAX_NODES} values")
        if len(keys) > MAX_DEPTH:
            raise self._refused(event, keys, f"nested more than {MAX_DEPTH} levels deep")
        self.places[keys] = _place(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, keys)
        if event.tag is not None:
            self._problem(event, keys, "a YAML tag: write the plain value without `!`")
        before = self.nodes
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, keys)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(event, keys)
        else:
            value = self._mapping(event, keys)
        if event.anchor:
            self.anchors[event.anchor] = (value, self.nodes - before + 1)
        return value

    def _alias(self, event: Any, keys: Keys) -> Any:
        # An anchor is known once its value is complete, so that no value can contain itself.
        if event.anchor not in self.anchors:
            raise self._refused(event, keys, ALIAS_OF_NOTHING)
        value, nodes = self.anchors[event.anchor]
        self.nodes += nodes
        return value

    def _list(self, event: Any, keys: Keys) -> list[Any]:
        self._stand_at_key(event, keys)
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*keys, len(items))))
        return items

    def _mapping(self, event: Any, keys: Keys) -> dict[str, Any]:
        self._stand_at_key(event, keys)
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, keys)
            place = _place(event)
            if key is None or key in mapping:
                if key is not None:
                    first = self.key_places[(*keys, key)][0]
                    self._problem(event, (*keys, key), f"duplicate key, first in line {first}")
                self._skip()
                continue
            self.key_places[(*keys, key)] = place
            mapping[key] = self._value(next(self.events), (*keys, key))
        return mapping

    def _key(self, event: Any, keys: Keys) -> str | None:
        """The key, or None (and a problem) when it is none."""
        if not isinstance(event, yaml.ScalarEvent):
            self._problem(event, keys, "a key must be text")
            if not isinstance(event, yaml.AliasEvent):
                self._skip_rest()
            return None
        if event.tag is not None:
            self._problem(event, keys, "a YAML tag: write the plain key without `!`")
        elif not isinstance(self._scalar(event, keys), str):
            self._problem(event, keys, f'a key must be text: write "{event.value}", in quotes')
            return None
        elif event.value == "<<" and event.implicit[0]:
            self._problem(event, keys, "no merge keys in YAML 1.2: write the keys out")
            return None
        return str(event.value)

    def _scalar(self, event: Any, keys: Keys) -> Any:
        if not event.implicit[0]:  # quoted, a block, or tagged
            return event.value
        try:
            return _plain(event.value)
        except ValueError:  # int() of thousands of digits
            self._problem(event, keys, "a number with too many digits")
            return 0

    def _stand_at_key(self, event: Any, keys: Keys) -> None:
        # The value of `tls:` begins a line further down; whoever looks for it looks for the key.
        if not event.flow_style and keys in self.key_places:
            self.places[keys] = self.key_places[keys]

    def _skip(self) -> None:
        event = next(self.events)
        if isinstance(event, yaml.CollectionStartEvent):
            self._skip_rest()

    def _skip_rest(self) -> None:
        depth = 1
        while depth:
            event = next(self.events)
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1

    def _problem(self, event: Any, keys: Keys, message: str) -> None:
        self.problems.append(Problem(self.file, *_place(event), dotted(keys), message))

    def _refused(self, event: Any, keys: Keys, message: str) -> ConfigError:
        self._problem(event, keys, message)
        return ConfigError(self.problems)


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _plain(text: str) -> Any:
    """An unquoted scalar by YAML 1.2's core schema (section 10.3.2). Raises ValueError."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "-+.0123456789":
        return text
    if _INT.fullmatch(text):
        if text.startswith(("0o", "0x")):
            return int(text, 0)
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
