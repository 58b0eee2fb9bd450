"""Who calls, and what is compiled for them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate

from sidecar.call import Target, digest, key_of
from sidecar.filter import CallNext


class Patterns:
    """Names and patterns (`*`, `?`) in order; exact names are found without a look at patterns."""

    __slots__ = ("_exact", "_patterns", "names")

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._exact = frozenset(name for name in self.names if not is_pattern(name))
        self._patterns = tuple(
            (name, re.compile(translate(name.replace("[", "[[]"))).match)
            for name in self.names
            if is_pattern(name)
        )

    def find(self, name: str) -> str | None:
        """The entry that `name` matches: itself, or the first pattern."""
        if name in self._exact:
            return name
        for pattern, match in self._patterns:
            if match(name):
                return pattern
        return None


def is_pattern(name: str) -> bool:
    """Whether `name` stands for others; brackets are plain characters, real names have them."""
    return "*" in name or "?" in name


class Models:
    """Public model names and their targets."""

    __slots__ = ("_exact", "_patterns", "_targets", "names")

    def __init__(self, targets: Mapping[str, tuple[Target, ...]]) -> None:
        self._targets = dict(targets)
        self._patterns = Patterns(self._targets)
        self._exact = {
            name: (name, each) for name, each in self._targets.items() if not is_pattern(name)
        }
        self.names = tuple(name for name in self._targets if not is_pattern(name))

    def find(self, model: str) -> tuple[str, tuple[Target, ...]] | None:
        """The configured name that `model` falls under, for labels, and its targets."""
        found = self._exact.get(model)
        if found is not None:
            return found
        name = self._patterns.find(model)
        return None if name is None else (name, self._targets[name])


@dataclass(frozen=True, slots=True)
class Team:
    """What is known of a caller. `models` and `upstreams` are what it may use."""

    name: str
    priority: str
    models: Patterns
    upstreams: frozenset[str]

    @property
    def may_use_all(self) -> bool:
        return self.models.names == ("*",)

    def may_use(self, model: str) -> bool:
        return self.models.find(model) is not None


@dataclass(frozen=True, slots=True)
class Policy:
    """A team with its compiled chain; `refuse` runs only the observers, for refused calls."""

    team: Team
    run: CallNext
    refuse: CallNext


class Callers:
    """Finds the policy of a caller by its key."""

    def __init__(
        self,
        by_key: Mapping[str, Policy],
        *,
        fixed: Policy | None,
        unknown: Policy,
    ) -> None:
        self._by_key = dict(by_key)
        self._fixed = fixed
        self.unknown = unknown
        """Under which calls with no valid key are logged and counted; it serves nobody."""

    @property
    def are_keyless(self) -> bool:
        """Whether nobody is asked for a key."""
        return self._fixed is not None

    def identify(self, headers: Mapping[str, str]) -> Policy | None:
        """The policy of whoever sent `headers`, or None when their key is nobody's.

        The key comes as Bearer, `x-api-key` or `api-key`. It is looked up by its SHA-256, so the
        time taken tells nothing about the keys there are.
        """
        if self._fixed is not None:
            return self._fixed
        return self._by_key.get(digest(key_of(headers)))


def offered_keys(value: str) -> list[str]:
    """What a credential header may mean as a key: all of it, what follows its scheme, and both
    halves of a Basic pair (RFC 7617)."""
    text = value.strip()
    rest = text.split(None, 1)[-1] if text else ""
    keys = [text, rest]
    try:
        keys += base64.b64decode(rest, validate=True).decode().split(":", 1)
    except ValueError:
        pass  # no Basic
    return keys
