"""The built-in filters, each with the least settings that it works with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from filters import BUILTIN
from sidecar.api import Filter, Secret
from tests.support.harness import MODEL, Use

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "budget": {
        "tokens_per_day": 1_000_000,
        "limits": [{"tokens": 10, "per": "week", "then": "warn"}],
    },
    "circuit_breaker": {"failure_threshold": 1000},  # calls must go on as before
    "priority_queue": {"max_in_flight": 10},
    "rate_limit": {"requests_per_minute": 1000, "burst": 100, "concurrency": 100},
    "retry": {"max_attempts": 1},  # a second try waits for the clock, which nobody turns
    "semantic_cache": {"embedding_model": MODEL},
    "timeout": {"first_byte_s": 100.0},
    "token_budget": {"tokens_per_minute": 1_000_000},
}
"""Of filters that do not work with their defaults."""

UPSTREAM_SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "circuit_breaker": {"plain": {}},
    "cost": {"plain": {"provider": "openai"}},
    "token_counter": {"plain": {}},
    "retry": {"plain": {}},
    "upstream_limits": {
        "configured": {"requests_per_minute": 1000, "tokens_per_minute": 10**6, "concurrency": 100},
        "by_key": {"requests_per_minute": 1000, "per": ["model", "key"]},
    },
    "sign": {
        "fixed": {"scheme": "bearer", "key": Secret("sk-upstream")},
        "pool": {"scheme": "bearer", "pool": [{"key": Secret("sk-1")}, {"key": Secret("sk-2")}]},
        "signature": {
            "scheme": "AWS4-HMAC-SHA256",
            "access_key_id": Secret("AKIDEXAMPLE"),
            "secret_access_key": Secret("secret-access-key"),
            "region": "us-east-1",
        },
    },
}
"""Sections of the upstream `fake`: for a filter that reads one, those that make it work
differently."""


def filter_class(name: str) -> type[Filter]:
    module, _, class_name = BUILTIN[name].partition(":")
    found: type[Filter] = getattr(importlib.import_module(module), class_name)
    return found


def uses() -> dict[str, Use]:
    """Every built-in filter, in each way that it works, by a name for tests."""
    found = {}
    for name in sorted(BUILTIN):
        each, settings = filter_class(name), SETTINGS.get(name, {})
        if each.UpstreamConfig is None:
            found[name] = Use(each, settings)
            continue
        for way, values in UPSTREAM_SETTINGS[name].items():
            section = each.UpstreamConfig.variant(values).model_validate(dict(values))
            found[f"{name}-{way}"] = Use(each, settings, {"fake": section})
    return found
