"""`Authorization: HMAC-SHA256 …`: Volcengine (and BytePlus) signature, for their open APIs.

Source: Volcengine, "Signature method" of the API access guide; where it leaves room, the provider's
SDKs decide. Ark takes no such signature for calls of models: that is scheme `volcengine-ark`.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from operator import itemgetter

from pydantic import Field, field_validator

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import (
    Request,
    Scheme,
    SendableSecret,
    Signed,
    basic_time,
    encode_path,
    encoded_parameters,
)
from sidecar.api import Secret, sendable_name

ALGORITHM = "HMAC-SHA256"
END = "request"

SIGNED_BESIDE_X = frozenset({"content-type", "content-md5", "host"})
"""What the provider's SDKs sign of a request, beside `x-*`."""

DEFAULT_CONTENT_TYPE = "application/x-www-form-urlencoded; charset=utf-8"
"""What the provider's SDKs send, and sign, with any request but a GET that has none."""

CLOCK_IS_OFF = (b"InvalidTimestamp",)
"""The code of "The signature of the request is expired", also when it is from the future."""


class Credentials(BaseCredentials):
    """Long-lived keys, or temporary ones of STS: then with `session_token`."""

    access_key_id: SendableSecret
    secret_access_key: Secret
    """As the console shows it; it looks like base64, and is not decoded."""
    session_token: SendableSecret | None = None


class Options(BaseOptions):
    """The scope that a signature is good for, and which headers it covers."""

    region: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Such as `cn-beijing`."""
    service: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """The provider's short name of the API, such as `ark` or `iam`."""
    signed_headers: list[str] | None = None
    """Those and no others, as far as the request has them; at least `host` and `x-date`. Temporary
    keys want `x-security-token` too. Without a list: `content-type`, `content-md5`, `host` and
    every `x-*`."""
    add_content_sha256_header: bool = True
    """Whether the hash of the body, which is signed in any case, is sent as `X-Content-Sha256`."""

    @field_validator("signed_headers")
    @classmethod
    def _has_what_the_provider_requires(cls, names: list[str] | None) -> list[str] | None:
        if names is None:
            return None
        names = sorted({name.lower() for name in names})
        for required in ("host", "x-date"):
            if required not in names:
                raise ValueError(f"add `{required}`: the provider requires that it is signed")
        for name in names:
            if name == "authorization":
                raise ValueError("take `authorization` out: it holds the signature")
            if name not in ("content-length", "host"):
                sendable_name(name)
        return names


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    date_time = basic_time(now)
    date = date_time[:8]
    body_hash = sha256(request.body or b"").hexdigest()

    headers = {"X-Date": date_time}
    has_type = request.header("content-type") is not None
    if options.signed_headers is None and request.method != "GET" and not has_type:
        headers["Content-Type"] = DEFAULT_CONTENT_TYPE
    if options.add_content_sha256_header:
        headers["X-Content-Sha256"] = body_hash
    if credentials.session_token is not None:
        headers["X-Security-Token"] = credentials.session_token.reveal()

    signed_headers, header_lines = _canonical_headers(request, headers, options.signed_headers)
    canonical_request = (
        f"{request.method}\n{encode_path(request.path)}\n{_canonical_query(request.query)}\n"
        f"{header_lines}\n\n{signed_headers}\n{body_hash}"
    )
    scope = f"{date}/{options.region}/{options.service}/{END}"
    canonical_hash = sha256(canonical_request.encode(errors="surrogateescape")).hexdigest()
    string_to_sign = f"{ALGORITHM}\n{date_time}\n{scope}\n{canonical_hash}"

    key = credentials.secret_access_key.reveal().encode()
    for part in (date, options.region, options.service, END):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, string_to_sign.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"{ALGORITHM} Credential={credentials.access_key_id.reveal()}/{scope}, "
        f"SignedHeaders={signed_headers}, Signature={signature}"
    )
    steps = {
        "canonical_request": canonical_request,
        "string_to_sign": string_to_sign,
        "signing_key_hex": key.hex(),
    }
    return Signed(headers, steps=steps)


def _canonical_query(query: str) -> str:
    """Encoded and then sorted, by name alone: values of one name keep their order."""
    pairs = sorted(encoded_parameters(query), key=itemgetter(0))
    return "&".join([f"{name}={value}" for name, value in pairs])


def _canonical_headers(
    request: Request, mine: dict[str, str], chosen: list[str] | None
) -> tuple[str, str]:
    """The names joined by `;`, and the lines `name:values`: the request's headers with `mine`."""
    found = {"host": [request.host.removesuffix(":443").removesuffix(":80")]}
    for name, value in request.headers:
        found.setdefault(name, []).append(value.strip(" \t"))
    for name, value in mine.items():
        found[name.lower()] = [value.strip(" \t")]
    if chosen is None:
        names = sorted([name for name in found if name in SIGNED_BESIDE_X or name[:2] == "x-"])
    else:
        names = [name for name in chosen if name in found]
    return ";".join(names), "\n".join([f"{name}:{','.join(found[name])}" for name in names])


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    own_headers=frozenset({"authorization", "x-content-sha256", "x-date", "x-security-token"}),
    needs_body=lambda options: True,
    expired=CLOCK_IS_OFF,
)
