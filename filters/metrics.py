"""Calls, times, bytes and tokens for Prometheus."""

from __future__ import annotations

from typing import Any

from sidecar.api import (
    SHORT_SECONDS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    End,
    FilterConfig,
    Kit,
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
            "Of the time to the first byte, what was not spent waiting for upstreams.",
            (),
            SHORT_SECONDS,
        )
        self._open = make.gauge("llm_api_open_calls", "Calls being answered now.", ("team",))
        self._bytes = make.counter(
            "llm_api_body_bytes", "Bytes of request and answer bodies.", (*PLACE, "direction")
        )
        self._tokens = make.counter(
            "llm_api_tokens", "Tokens as reported by providers.", (*PLACE, "direction")
        )
        self._open_here = self._open.child(kit.team)
        self._overhead_here = self._overhead.child()
        # The children of one label set, looked up once: nine look-ups a call become two.
        self._places: dict[tuple[str, str], Any] = {}

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        self._open_here.inc()
        call.on_end(lambda end: self._count(call, end))
        return await call_next(call)

    def _count(self, call: Call, end: End) -> None:
        now = self.kit.clock.monotonic()
        self._open_here.dec()
        target = call.target or (call.targets[0] if call.targets else None)
        model = call.label or "-"
        upstream = target.upstream.name if target is not None else "-"
        team = call.team.name
        place = self._places.get((model, upstream))
        if place is None:
            place = self._places[model, upstream] = (
                self._latency.child(model),
                self._first_byte.child(model),
                self._bytes.child(model, upstream, team, "in"),
                self._bytes.child(model, upstream, team, "out"),
                self._tokens.child(model, upstream, team, "input"),
                self._tokens.child(model, upstream, team, "output"),
            )
        latency, first_byte, bytes_in, bytes_out, tokens_in, tokens_out = place
        status = str(call.status) if 100 <= call.status < 600 else "0"
        self._calls.child(model, upstream, team, status, end.outcome.value).inc()
        latency.observe(now - call.received_at)
        if call.replied_at:
            first_byte_s = call.replied_at - call.received_at
            first_byte.observe(first_byte_s)
            self._overhead_here.observe(max(0.0, first_byte_s - call.upstream_wait_s))
        bytes_in.inc(call.bytes_in)
        bytes_out.inc(call.bytes_out)
        usage = call.get(USAGE)
        if usage is not None:
            tokens_in.inc(usage.input)
            tokens_out.inc(usage.output)
