"""Who shares recorded answers, and where these would come from: what every key of a cache has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from filters.algo.cache_key import target_part
from sidecar.api import Call, Target

Scope = Literal["team", "key", "all"]


class Sharing:
    """The parts of keys that are not of the request. `origins` are the kit's."""

    def __init__(self, scope: Scope, team: str, origins: Mapping[str, Any]) -> None:
        self._scope = b"" if scope == "all" else team.encode()
        self._is_by_key = scope == "key"
        self._origins = origins
        self._places: dict[str, tuple[tuple[Target, ...], bytes, bool]] = {}  # by label

    def parts(self, call: Call) -> tuple[bytes, ...]:
        targets = call.targets if call.target is None else (call.target,)
        place = self._places.get(call.label)
        if place is None or place[0] is not targets:
            names = [(each.upstream.name, each.model) for each in targets]
            passes_key = any(each.upstream.passes_client_key for each in targets)
            place = (targets, target_part(names, self._origins), passes_key)
            self._places[call.label] = place
        _, part, passes_key = place
        if passes_key or self._is_by_key:  # the provider knows each of them
            return (self._scope, part, call.key_id.encode())
        return (self._scope, part)
