"""Who shares recorded answers, and where these would come from: what every key of a cache has."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Literal

from filters.algo.cache_key import target_part
from sidecar.api import CLIENT_KEYS, Call, Target

Scope = Literal["team", "key", "all"]


class Sharing:
    """The parts of keys that are not of the request. `places` are the kit's; `settings` is what
    else must be the same for all who share: what a filter is told to leave out, say."""

    def __init__(
        self, scope: Scope, team: str, places: Mapping[str, str], settings: object = None
    ) -> None:
        told = sha256(repr(settings).encode()).digest()
        self._scope = told + (b"" if scope == "all" else team.encode())
        self._is_by_key = scope == "key"
        self._places = places
        self._known: dict[str, tuple[tuple[Target, ...], bytes, bool]] = {}  # by label

    def parts(self, call: Call) -> tuple[bytes, ...]:
        targets = call.targets if call.target is None else (call.target,)
        known = self._known.get(call.label)
        if known is None or known[0] is not targets:
            names = [(each.upstream.name, each.model) for each in targets]
            passes_key = any(each.upstream.passes_client_key for each in targets)
            known = (targets, target_part(names, self._places), passes_key)
            self._known[call.label] = known
        _, part, passes_key = known
        if passes_key:  # the provider knows each of them
            return (self._scope, part, _credentials(call))
        if self._is_by_key:
            return (self._scope, part, call.key_id.encode())
        return (self._scope, part)


def _credentials(call: Call) -> bytes:
    """Stands for all that a caller may be known by to the provider."""
    sent = sorted(
        b"%b:%b" % (name.lower(), value)
        for name, value in call.raw_headers
        if name.lower() in CLIENT_KEYS
    )
    return sha256(b"\n".join(sent)).digest()
