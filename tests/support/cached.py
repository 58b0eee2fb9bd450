"""Recorded answers as tests of caches need them."""

from __future__ import annotations

from typing import Any

from filters.stores.entry import Entry
from sidecar.api import Usage
from sidecar.metrics import Metrics

NOW = 1_700_000_000.0
"""The fake clock's beginning."""


def entry(body: bytes = b'{"ok": true}', **changes: Any) -> Entry:
    """An answer that lives for an hour of the fake clock's, unless told otherwise."""
    plain = Entry(
        status=200,
        headers=((b"content-type", b"application/json"), (b"x-raw", b"\xff\x00")),
        media_type="application/json",
        body=body,
        rhythm=(),
        usage=Usage(10, 20, cached=3),
        team="red",
        model="gpt-4o-mini",
        upstream="mock",
        upstream_model="gpt-4o-mini-2024",
        created_at=NOW,
        expires_at=NOW + 3600.0,
    )
    return plain._replace(**changes)


def figure(metrics: Metrics, name: str, *labels: str) -> float:
    """The value of `llm_sidecar_cache_{name}` for these labels."""
    for family in metrics.snapshot():
        if family["name"] == f"llm_sidecar_cache_{name}":
            return float(sum(value for each, value in family["samples"] if each == list(labels)))
    raise AssertionError(f"no metric {name}")
