"""Sends a scheme's request for a token as the sidecar does."""

from __future__ import annotations

from filters.signers.scheme import TokenRequest
from sidecar.config.schema import UpstreamSettings
from sidecar.filter import Fetched
from sidecar.transport.fetch import fetch

SETTINGS = UpstreamSettings(dialect="openai", base_url="https://upstream.test")


async def ask(request: TokenRequest) -> Fetched:
    return await fetch(SETTINGS, request.method, request.url, request.headers, request.body)
