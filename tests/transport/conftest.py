"""A raw upstream and the real client in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sidecar.call import Attempt
from sidecar.config.schema import UpstreamSettings
from sidecar.reply import Reply
from sidecar.transport.upstream import LiveUpstream, open_pool, parse_base_url
from tests.support.attempts import (
    EMPTY_POOL,
    Begin,
    Exchange,
    OpenUpstream,
    make_attempt,
    until,
)
from tests.support.upstream import RawConnection, RawUpstream


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


@pytest.fixture
async def open_upstream() -> AsyncIterator[OpenUpstream]:
    """Makes upstreams from settings; afterwards their pools must be empty."""
    opened: list[LiveUpstream] = []

    def open_one(base_url: str, **settings: Any) -> LiveUpstream:
        checked = UpstreamSettings(dialect="openai", base_url=base_url, **settings)
        origin, base_path = parse_base_url(base_url)
        pool = open_pool(checked, origin)
        upstream = LiveUpstream("raw", checked, origin=origin, base_path=base_path, pool=pool)
        opened.append(upstream)
        return upstream

    yield open_one
    for upstream in opened:
        upstream.pool.close()
        await until(lambda pool=upstream.pool: repr(pool) == EMPTY_POOL, within_s=2.0)


@pytest.fixture
async def upstream(raw: RawUpstream, open_upstream: OpenUpstream) -> LiveUpstream:
    """The client of `raw`, with default settings."""
    return open_upstream(raw.base_url, proxy="none")


@pytest.fixture
async def begin(raw: RawUpstream, upstream: LiveUpstream) -> AsyncIterator[Begin]:
    """Sends an attempt and reads its request; on a new connection unless `on` is given."""
    tasks: list[asyncio.Task[Reply]] = []

    async def begin_one(
        attempt: Attempt | None = None, *, on: RawConnection | None = None, **kwargs: Any
    ) -> Exchange:
        attempt = attempt or make_attempt(upstream, **kwargs)
        task = asyncio.create_task(upstream.send(attempt))
        tasks.append(task)
        connection = on or await raw.accept()
        return Exchange(task, connection, await connection.read_request())

    yield begin_one
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Reply):
            result.discard()
