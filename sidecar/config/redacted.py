"""The effective configuration for people to look at: references, never values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sidecar.config.schema import Config, TeamSettings
from sidecar.config.secret import HIDDEN, Secret

_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:.+")
_SECRET_KEY = re.compile(r"(^|[_-])(key|secret|token|password|passwd|credentials?)$", re.IGNORECASE)


def redacted(config: Config, teams: Sequence[TeamSettings]) -> dict[str, Any]:
    """`{"config": {...}, "teams": [{...}]}` as JSON values, defaults included.

    A secret shows as `***`, or as the reference it was given by (`env:NAME`).
    """
    return {
        "config": _shown(config.model_dump()),
        "teams": [_shown(team.model_dump()) for team in teams],
    }


def _shown(value: Any, key: str = "") -> Any:
    if isinstance(value, Secret):
        return value.reference or HIDDEN
    if isinstance(value, dict):
        return {name: _shown(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_shown(each, key) for each in value]
    # A section no type of ours describes: a foreign filter may take a secret as plain text.
    if isinstance(value, str) and _SECRET_KEY.search(key) and not _REFERENCE.fullmatch(value):
        return HIDDEN
    return value
