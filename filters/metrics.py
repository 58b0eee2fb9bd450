"""Calls, times, bytes and tokens for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import NamedTuple

from sidecar.api import (
    CACHED,
    SHORT_SECONDS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Counter,
    End,
    FilterConfig,
    Gauge,
    Histogram,
    Kit,
    Outcome,
    Reply,
)

CALL = ("model", "upstream", "team", "status", "outcome")
PLACE = ("model", "upstream", "team")


class CallMetrics(CallFilter):
    """Counts and times every call.

    Switch it on to watch and to alert. Place it near the outside: what stands inside is part of
    the measured time. Labels come from the configuration only: a model nobody configured is
    `unknown`, a call to no upstream has `-`.
    """

    class Config(FilterConfig):
        """No settings."""

    sees_refused = True

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        make = kit.metrics
        self._calls = make.counter("llm_api_requests", "Calls that ended.", CALL)
        self._latency = make.histogram(
            "llm_api_request_latency_seconds",
            "From the request's head to the end of the answer.",
            ("model",),
        )
        self._first_byte = make.histogram(
            "llm_api_time_to_first_byte_seconds",
            "From the request's head to the first byte of the answer.",
            ("model",),
        )
        self._overhead = make.histogram(
            "llm_sidecar_overhead_seconds",
            "Of the time to the first byte, what was not waited for upstreams or on purpose.",
            (),
            SHORT_SECONDS,
        )
        self._open = make.gauge("llm_api_open_calls", "Calls being answered now.", ("team",))
        self._bytes = make.counter(
            "llm_api_body_bytes", "Bytes of request and answer bodies.", (*PLACE, "direction")
        )
        self._tokens = make.counter(
            "llm_api_tokens",
            "Tokens that calls took; cached ones take none.",
            (*PLACE, "direction"),
        )
        self._open_here: Gauge = self._open.child(kit.team)
        self._overhead_here: Histogram = self._overhead.child()
        # All that one set of labels counts, found by one look-up at the end of a call.
        self._series: dict[tuple[str, str, int, Outcome], Series] = {}

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        self._open_here.value += 1
        call.on_end(partial(self._count, call))
        return call_next(call)

    def _count(self, call: Call, end: End) -> None:
        now = self.kit.clock.monotonic()
        self._open_here.value -= 1
        target = call.current_target
        upstream = target.upstream.name if target is not None else "-"
        key = (call.label, upstream, call.status, end.outcome)
        series = self._series.get(key) or self._open_series(*key)
        series.calls.value += 1
        series.latency.observe(now - call.received_at)
        if call.replied_at:
            first_byte_s = call.replied_at - call.received_at
            series.first_byte.observe(first_byte_s)
            self._overhead_here.observe(first_byte_s - call.upstream_wait_s - call.held_s)
        series.bytes_in.value += call.bytes_in
        series.bytes_out.value += call.bytes_out
        usage = call.get(USAGE)
        if usage is not None and CACHED not in call:
            series.tokens_in.value += usage.input
            series.tokens_out.value += usage.output

    def _open_series(self, label: str, upstream: str, status: int, outcome: Outcome) -> Series:
        model, team = label or "-", self.kit.team
        word = str(status) if 100 <= status < 600 else "0"
        series = Series(
            calls=self._calls.child(model, upstream, team, word, outcome),
            latency=self._latency.child(model),
            first_byte=self._first_byte.child(model),
            bytes_in=self._bytes.child(model, upstream, team, "in"),
            bytes_out=self._bytes.child(model, upstream, team, "out"),
            tokens_in=self._tokens.child(model, upstream, team, "input"),
            tokens_out=self._tokens.child(model, upstream, team, "output"),
        )
        self._series[label, upstream, status, outcome] = series
        return series


class Series(NamedTuple):
    """The children of one set of labels."""

    calls: Counter
    latency: Histogram
    first_byte: Histogram
    bytes_in: Counter
    bytes_out: Counter
    tokens_in: Counter
    tokens_out: Counter
