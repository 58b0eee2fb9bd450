"""Whom a limit counts together: the calls of a team, at an upstream, with a key, of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from sidecar.api import Call

Per = Literal["team", "model", "upstream", "key"]


class Names(NamedTuple):
    """By what a call is counted; empty where nothing asks for it.

    In this order they stand in keys: the last one may hold any character, the others cannot.
    """

    team: str = ""
    upstream: str = ""
    key: str = ""
    model: str = ""


class NameReader:
    """Reads off a call what the limits of one filter count by, and nothing else."""

    def __init__(self, team: str, per: Iterable[Per]) -> None:
        self._team = team
        self._per = frozenset(per)
        self.is_fixed = self._per <= {"team"}
        """Every call of this filter has the same names."""

    def __call__(self, call: Call) -> Names:
        """The names of `call`: model by its label, upstream of its first target."""
        per = self._per
        upstream = key = ""
        if "upstream" in per:
            target = call.current_target
            upstream = "-" if target is None else target.upstream.name
        if "key" in per:
            key = call.key_id or "-"
        return Names(self._team, upstream, key, (call.label or "-") if "model" in per else "")


def key_of(per: Iterable[Per], names: Names) -> str:
    """What stands for the counted calls in a store: `team=search,model=gpt-4o`; `all` of no one."""
    wanted = frozenset(per)
    parts = [f"{name}={getattr(names, name)}" for name in Names._fields if name in wanted]
    return ",".join(parts) or "all"


def words_of(per: Iterable[Per], names: Names) -> str:
    """The same for people; a key is not shown."""
    wanted = frozenset(per)
    parts = [
        "this key" if name == "key" else f"{name} {getattr(names, name)}"
        for name in Names._fields
        if name in wanted
    ]
    return ", ".join(parts) or "all callers"
