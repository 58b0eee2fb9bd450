"""`Authorization: ACS3-HMAC-SHA256 …`: the OpenAPI of Alibaba Cloud, such as Model Studio's.

Source: Alibaba Cloud, "Request syntax and signature method V3"; where it leaves room, the SDK
(alibabacloud-tea-openapi) decides. The models themselves (DashScope) take an API key: that is
scheme `bearer`.
"""

from __future__ import annotations

import hmac
from hashlib import sha256

from pydantic import Field

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import (
    Request,
    Scheme,
    SendableSecret,
    Signed,
    chosen,
    encode,
    encode_path,
    extended_time,
    parameters,
)
from sidecar.api import Secret

ALGORITHM = "ACS3-HMAC-SHA256"
TOKEN = r"^[A-Za-z0-9._-]+$"

OWN_HEADERS = frozenset(
    {
        *("authorization", "x-acs-date", "x-acs-signature-nonce", "x-acs-content-sha256"),
        *("x-acs-security-token", "x-acs-accesskey-id"),
        # Of older methods and of other kinds of credentials: they name another time or signer.
        *("date", "x-acs-signature-type", "x-acs-signature-method", "x-acs-signature-version"),
        *("x-acs-bearer-token", "x-acs-zero-trust-idtoken", "x-acs-credentials-provider"),
    }
)
"""Lower case."""

CLOCK_IS_OFF = (
    b"InvalidTimeStamp.Expired",  # by more than 15 min
    b"IllegalTimestamp",  # the same; its message speaks of a missing parameter
)


class Credentials(BaseCredentials):
    """An AccessKey pair, or a temporary one of STS: then with `security_token`."""

    access_key_id: SendableSecret
    access_key_secret: Secret
    security_token: SendableSecret | None = None


class Options(BaseOptions):
    """Which operation; what is not set here, each request has to say in a header."""

    action: str | None = Field(default=None, pattern=TOKEN)
    """Such as `ListIndices`; none: that of the caller's `x-acs-action`."""
    version: str | None = Field(default=None, pattern=TOKEN)
    """Of the API, such as `2023-12-29`; none: that of the caller's `x-acs-version`."""


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    body_hash = sha256(request.body or b"").hexdigest()
    headers = {
        "x-acs-action": chosen(options.action, "action", "x-acs-action", request),
        "x-acs-version": chosen(options.version, "version", "x-acs-version", request),
        "x-acs-date": extended_time(now),
        "x-acs-signature-nonce": nonce,
        "x-acs-content-sha256": body_hash,
    }
    if credentials.security_token is not None:
        headers["x-acs-security-token"] = credentials.security_token.reveal()

    signed_headers, header_lines = _canonical_headers(request, headers)
    canonical_request = (
        f"{request.method}\n{encode_path(request.path)}\n{_canonical_query(request.query)}\n"
        f"{header_lines}\n\n{signed_headers}\n{body_hash}"
    )
    canonical_hash = sha256(canonical_request.encode(errors="surrogateescape")).hexdigest()
    string_to_sign = f"{ALGORITHM}\n{canonical_hash}"
    key = credentials.access_key_secret.reveal().encode()
    signature = hmac.digest(key, string_to_sign.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"{ALGORITHM} Credential={credentials.access_key_id.reveal()},"
        f"SignedHeaders={signed_headers},Signature={signature}"
    )
    steps = {"canonical_request": canonical_request, "string_to_sign": string_to_sign}
    return Signed(headers, steps=steps)


def _canonical_query(query: str) -> str:
    """Sorted by the names as they are before encoding; those that repeat stay in their order."""
    pairs = sorted(parameters(query), key=lambda pair: pair[0])
    return "&".join([f"{encode(name)}={encode(value)}" for name, value in pairs])


def _canonical_headers(request: Request, mine: dict[str, str]) -> tuple[str, str]:
    """The names joined by `;`, and the lines `name:values`: the request's headers with `mine`.

    The server goes by the list it is sent, so of the rest, which proxies on the way may rewrite,
    nothing is signed.
    """
    found = {"host": [request.host]}
    for name, value in request.headers:
        if name == "content-type" or name.startswith("x-acs-"):
            # Of ASCII alone: a bare `strip` would take a no-break space off, too.
            found.setdefault(name, []).append(value.strip(" \t"))
    for name, value in mine.items():
        found[name] = [value.strip(" \t")]
    names = sorted(found)
    lines = [f"{name}:{','.join(sorted(found[name]))}" for name in names]
    return ";".join(names), "\n".join(lines)


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    own_headers=OWN_HEADERS,
    needs_body=lambda options: True,
    expired=CLOCK_IS_OFF,
)
