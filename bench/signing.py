"""What it costs to sign an attempt, in this process: the filter `sign` with each scheme.

Everything but the transport: the pool's choice, the scheme's functions, the changed head, and the
look at the answer. The request is an SDK's chat call of 1 KB; each has another body and time.
"""

import asyncio
import logging
import statistics
from collections.abc import Mapping, Sequence
from time import perf_counter_ns
from typing import Any, cast

from bench.figures import Plan, Results, tell
from bench.proxies import Lane
from filters.sign import Sign
from filters.signers import SCHEMES
from filters.signers.settings import SignSettings
from sidecar.api import Attempt, Fetched, FilterConfig, Headers, Kit, Reply, Secret
from sidecar.clock import SystemClock
from sidecar.filter import KitResources, StoreAddress
from sidecar.metrics import Metrics
from sidecar.resources import Resources
from sidecar.tasks import Tasks

BODY_BYTES = 1024
HEADERS = [
    (b"accept", b"application/json"),
    (b"content-type", b"application/json"),
    (b"user-agent", b"AsyncOpenAI/Python 3.54.0"),
    (b"x-stainless-lang", b"python"),
    (b"x-stainless-package-version", b"3.54.0"),
    (b"x-stainless-os", b"Linux"),
    (b"x-stainless-arch", b"x64"),
    (b"x-stainless-runtime", b"CPython"),
    (b"x-stainless-runtime-version", b"3.11.7"),
    (b"x-stainless-async", b"async:asyncio"),
    (b"x-stainless-retry-count", b"0"),
    (b"x-stainless-read-timeout", b"600"),
    (b"x-request-id", b"4bf92f3577b34da6a3ce929d0e0e4736"),
    (b"accept-encoding", b"identity"),
]
_AK = Secret("AKIDexample0123456789")
_SK = Secret("c2VjcmV0LWFjY2Vzcy1rZXktZXhhbXBsZQ")
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bearer": {"key": _SK},
    "bce-auth-v1": {"access_key_id": _AK, "secret_access_key": _SK},
    "ACS3-HMAC-SHA256": {
        "access_key_id": _AK,
        "access_key_secret": _SK,
        "action": "ListIndices",
        "version": "2023-12-29",
    },
    "TC3-HMAC-SHA256": {
        "secret_id": _AK,
        "secret_key": _SK,
        "service": "hunyuan",
        "action": "ChatCompletions",
        "version": "2023-09-01",
        "region": "ap-guangzhou",
    },
    "volcengine-HMAC-SHA256": {
        "access_key_id": _AK,
        "secret_access_key": _SK,
        "region": "cn-beijing",
        "service": "ark",
    },
    "AWS4-HMAC-SHA256": {
        "access_key_id": _AK,
        "secret_access_key": _SK,
        "session_token": Secret("FwoGZXIvYXdzEFAKE" * 20),
        "region": "us-east-1",
    },
    "iflytek-hmac-sha256": {"api_key": _AK, "api_secret": _SK, "mode": "header-digest"},
    "zhipu-jwt-hs256": {"api_key": Secret("0123456789abcdef.FakeSecret000001")},
}
"""Schemes that are measured: those that sign each request, one that does not, and a token."""

HMAC_SCHEMES = tuple(name for name in SETTINGS if name not in ("bearer", "zhipu-jwt-hs256"))
assert set(SETTINGS) <= set(SCHEMES)


class Outgoing:
    """An attempt, as far as signing goes."""

    upload = None
    method = "POST"
    key_gate = None

    def __init__(self, upstream: Any, body: bytes) -> None:
        self.upstream = upstream
        self.body = body
        self.content_length = len(body)
        self.path = "/model/anthropic.claude-3-haiku-20240307-v1%3A0/converse"
        self.headers = Headers.of_raw(HEADERS)

    def on_end(self, debt: Any) -> None:
        pass


class _Upstream:
    name, scheme, host = "bench", "https", "bedrock-runtime.us-east-1.amazonaws.com"


async def signing(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU of this process per attempt signed; no proxy takes part."""
    filters = {name: _filter(name) for name in SETTINGS}
    taken: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(plan.sign_rounds):
        for name, each in filters.items():
            taken[name].append(await _round_us(each, plan.sign_attempts))
    for name, values in taken.items():
        results.put(name, "sign_us", statistics.median(values))
        tell(f"  signing  {name:24} {statistics.median(values):.1f} us an attempt")
    results.put("signing", "sign_us", max(results.values[each, "sign_us"] for each in HMAC_SCHEMES))


def _filter(name: str) -> Sign:
    values = {"scheme": name, **SETTINGS[name]}
    settings = SignSettings.variant(values).model_validate(values)
    kit = Kit(
        data_dir=None,
        places={},
        find_model=lambda name: None,
        clock=SystemClock(),
        metrics=Metrics(),
        tasks=Tasks(),
        log=logging.getLogger("bench"),
        access_log=lambda line: None,
        team="bench",
        upstreams={"bench": settings},
        origins={"bench": (_Upstream.scheme, _Upstream.host)},
        store=StoreAddress(),
        workers=1,
        max_connections=100,
        fetch=_no_fetch,
        resources=KitResources(Resources(), 1),
    )
    return Sign(FilterConfig(), kit)


async def _no_fetch(
    upstream: str, method: str, url: str, headers: Mapping[str, str], body: bytes
) -> Fetched:
    raise NotImplementedError


async def _round_us(sign: Sign, attempts: int) -> float:
    bodies = [(b"%d " % number).ljust(BODY_BYTES, b"x") for number in range(attempts)]
    reply = Reply.of(200, b"{}", media_type="text/event-stream")

    async def call_next(attempt: Attempt) -> Reply:
        return reply

    upstream = _Upstream()
    await asyncio.sleep(0)
    began = perf_counter_ns()
    for body in bodies:
        await sign.handle(cast(Attempt, Outgoing(upstream, body)), call_next)
    return (perf_counter_ns() - began) / 1000 / attempts
