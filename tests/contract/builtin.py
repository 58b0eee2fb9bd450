"""The built-in filters, each with the least settings that it works with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from filters import BUILTIN
from sidecar.api import Filter, FilterConfig, Secret
from tests.support.harness import Use

SETTINGS: Mapping[str, Mapping[str, Any]] = {}
"""Of filters that do not work with their defaults."""

UPSTREAM_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "sign": {"scheme": "bearer", "key": Secret("sk-upstream")},
}
"""Sections of the upstream `fake`."""


def filter_class(name: str) -> type[Filter]:
    module, _, class_name = BUILTIN[name].partition(":")
    found: type[Filter] = getattr(importlib.import_module(module), class_name)
    return found


def use_of(name: str) -> Use:
    found = filter_class(name)
    sections: dict[str, FilterConfig] = {}
    if found.UpstreamConfig is not None and name in UPSTREAM_SETTINGS:
        sections["fake"] = found.UpstreamConfig.model_validate(dict(UPSTREAM_SETTINGS[name]))
    return Use(found, SETTINGS.get(name, {}), sections)
