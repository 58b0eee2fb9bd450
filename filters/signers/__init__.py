"""Signing schemes by name, one module each. A module is imported when its scheme is asked for."""

from __future__ import annotations

from importlib import import_module

from filters.signers.scheme import Scheme

SCHEMES = {
    "bearer": "bearer",
    "basic": "basic",
    "header": "header",
    "query": "query",
    "api-key": "api_key",
    "x-goog-api-key": "x_goog_api_key",
    "bce-auth-v1": "bce_auth_v1",
    "baidu-oauth": "baidu_oauth",
    "bce-bearer": "bce_bearer",
    "ACS3-HMAC-SHA256": "acs3",
    "TC3-HMAC-SHA256": "tc3",
    "volcengine-HMAC-SHA256": "volcengine",
    "volcengine-ark": "volcengine_ark",
    "AWS4-HMAC-SHA256": "aws4",
    "zhipu-jwt-hs256": "zhipu_jwt",
    "iflytek-hmac-sha256": "iflytek",
}
"""The name in `sign.scheme`, and the module here whose `SCHEME` it means."""


def find(name: str) -> Scheme:
    """The scheme called `name`. Raises KeyError when there is none."""
    found: Scheme = import_module(f"{__name__}.{SCHEMES[name]}").SCHEME
    return found
