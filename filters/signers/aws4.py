"""`Authorization: AWS4-HMAC-SHA256 …`: AWS Signature Version 4, for Amazon Bedrock.

Source: AWS, "Signature Version 4 for API requests"; where it leaves room, botocore decides. Bedrock
takes an API key as well: that is scheme `bearer`.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from urllib.parse import quote

from pydantic import Field

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import (
    Request,
    Scheme,
    SendableSecret,
    Signed,
    basic_time,
    encoded_parameters,
)
from sidecar.api import Secret

ALGORITHM = "AWS4-HMAC-SHA256"
END = "aws4_request"

NEVER_SIGNED = frozenset(
    {
        # Belong to one connection: every proxy on the way may set them.
        *("connection", "expect", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailer", "transfer-encoding", "upgrade"),
        # Tracing, which rewrites them on the way.
        *("baggage", "traceparent", "tracestate", "x-amzn-trace-id"),
        *("authorization", "user-agent"),
    }
)
"""Lower case; the list of botocore."""

CLOCK_IS_OFF = (
    # Codes, and then messages of codes that a wrong key shares.
    *(b"RequestExpired", b"RequestInTheFuture", b"RequestTimeTooSkewed"),
    *(b"Signature expired", b"Signature not yet current"),
)


class Credentials(BaseCredentials):
    """Long-lived keys, or temporary ones of STS: then with `session_token`."""

    access_key_id: SendableSecret
    secret_access_key: Secret
    session_token: SendableSecret | None = None


class Options(BaseOptions):
    """The scope that a signature is good for."""

    region: str = Field(pattern=r"^[A-Za-z0-9-]+$")
    """Such as `us-east-1`: the one in the upstream's host name."""
    service: str = Field(default="bedrock", pattern=r"^[A-Za-z0-9-]+$")
    """`bedrock` for `bedrock-runtime.REGION.amazonaws.com`, `bedrock-mantle` for
    `bedrock-mantle.REGION.api.aws`."""


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    date_time = basic_time(now)
    date = date_time[:8]
    body_hash = sha256(request.body or b"").hexdigest()

    headers = {"X-Amz-Date": date_time}
    if credentials.session_token is not None:
        headers["X-Amz-Security-Token"] = credentials.session_token.reveal()
    if request.header("x-amz-content-sha256") is not None:
        # It has to agree with the body, which filters may have changed since the caller hashed it.
        headers["X-Amz-Content-SHA256"] = body_hash

    signed_headers, header_lines = _canonical_headers(request, headers)
    canonical_request = (
        f"{request.method}\n{_canonical_path(request.path)}\n{_canonical_query(request.query)}\n"
        f"{header_lines}\n\n{signed_headers}\n{body_hash}"
    )
    scope = f"{date}/{options.region}/{options.service}/{END}"
    canonical_hash = sha256(canonical_request.encode(errors="surrogateescape")).hexdigest()
    string_to_sign = f"{ALGORITHM}\n{date_time}\n{scope}\n{canonical_hash}"

    key = f"AWS4{credentials.secret_access_key.reveal()}".encode()
    for part in (date, options.region, options.service, END):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, string_to_sign.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"{ALGORITHM} Credential={credentials.access_key_id.reveal()}/{scope}, "
        f"SignedHeaders={signed_headers}, Signature={signature}"
    )
    steps = {"canonical_request": canonical_request, "string_to_sign": string_to_sign}
    return Signed(headers, steps=steps)


def _canonical_path(path: str) -> str:
    """The path of the wire encoded once more, without empty and dot segments.

    All services but S3 want it so: a `%3A` of the wire is `%253A` here, a `:` is `%3A`.
    """
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment and segment != ".":
            kept.append(segment)
    end = "/" if kept and path.endswith("/") else ""
    return quote(f"/{'/'.join(kept)}{end}", safe="/~", errors="surrogateescape")


def _canonical_query(query: str) -> str:
    return "&".join([f"{name}={value}" for name, value in sorted(encoded_parameters(query))])


def _canonical_headers(request: Request, mine: dict[str, str]) -> tuple[str, str]:
    """The names joined by `;`, and the lines `name:values`: the request's headers with `mine`."""
    default_port = ":443" if request.url_scheme == "https" else ":80"
    found = {"host": [request.host.removesuffix(default_port)]}
    for name, value in request.headers:
        if name not in NEVER_SIGNED:
            found.setdefault(name, []).append(_trimmed(value))
    for name, value in mine.items():
        found[name.lower()] = [_trimmed(value)]
    names = sorted(found)
    return ";".join(names), "\n".join([f"{name}:{','.join(found[name])}" for name in names])


def _trimmed(value: str) -> str:
    """`value` with one space for each run of white space, and none around it.

    Of ASCII alone: `str.split` takes a no-break space for white space too, other signers do not.
    """
    words = value.encode(errors="surrogateescape").split()
    return b" ".join(words).decode(errors="surrogateescape")


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    # `date` would be a second, older time: botocore signs with it in place of `x-amz-date`.
    own_headers=frozenset({"authorization", "date", "x-amz-date", "x-amz-security-token"}),
    needs_body=lambda options: True,
    expired=CLOCK_IS_OFF,
)
