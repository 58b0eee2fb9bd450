"""A running mock provider and plain HTTP to it."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from sidecar.mock import MockProvider


@pytest.fixture
async def provider() -> AsyncIterator[MockProvider]:
    provider = MockProvider()
    yield provider
    await provider.stop()


@pytest.fixture
async def address(provider: MockProvider) -> str:
    return await provider.start()


@pytest.fixture
async def session(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=f"http://{address}") as session:
        yield session
