"""`Authorization: TC3-HMAC-SHA256 …`: Tencent Cloud API 3.0, such as Hunyuan's `ChatCompletions`.

Source: Tencent Cloud, "Signature v3"; where it leaves room, the SDK (tencentcloud-sdk-python)
decides. Hunyuan's interface in the manner of OpenAI takes an API key: that is scheme `bearer`.
"""

from __future__ import annotations

import hmac
import re
from hashlib import sha256

from pydantic import Field, field_validator

from filters.signers.scheme import (
    CannotSign,
    Request,
    Scheme,
    SendableSecret,
    Signed,
    chosen,
    extended_time,
)
from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from sidecar.api import Secret

ALGORITHM = "TC3-HMAC-SHA256"
END = "tc3_request"
UNSIGNED = "UNSIGNED-PAYLOAD"
TOKEN = r"^[A-Za-z0-9._-]+$"

CLOCK_IS_OFF = (
    *(b'"Code":"AuthFailure.SignatureExpire"', b'"Code": "AuthFailure.SignatureExpire"'),
)
"""By more than 5 min; it comes in an answer 200."""

_ERROR = re.compile(rb'"Error"\s*:\s*\{[^{}]*?"Code"\s*:\s*"([A-Za-z0-9.]+)"').search

_SERVICE = re.compile(r"([a-z][a-z0-9-]*)\.[a-z]", re.IGNORECASE).match


class Credentials(BaseCredentials):
    """A key pair, or a temporary one of STS: then with `token`."""

    secret_id: SendableSecret
    secret_key: Secret
    token: SendableSecret | None = None


class Options(BaseOptions):
    """Which operation, and what of a request is signed."""

    service: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]+$")
    """Such as `hunyuan`; none: the first label of the host."""
    action: str | None = Field(default=None, pattern=TOKEN)
    """Such as `ChatCompletions`; none: that of the caller's `X-TC-Action`."""
    version: str | None = Field(default=None, pattern=TOKEN)
    """Of the API, such as `2023-09-01`; none: that of the caller's `X-TC-Version`."""
    region: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]*$")
    """Such as `ap-guangzhou`; none: that of the caller's `X-TC-Region`, if there is one. Empty: the
    API knows no regions, and a request that names one is refused."""
    signed_headers: list[str] = ["content-type", "host"]
    """At least these two; what else is named, such as `x-tc-action`, every request has to have."""
    unsigned_payload: bool = False
    """Sign all but the body, which can stream through then."""

    @field_validator("signed_headers")
    @classmethod
    def _are_enough(cls, names: list[str]) -> list[str]:
        lower = {name.lower() for name in names}
        if not lower >= {"content-type", "host"}:
            raise ValueError("content-type and host have to be signed: name them, too")
        if "authorization" in lower:
            raise ValueError("authorization holds the signature and cannot be signed: take it out")
        return sorted(lower)


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    timestamp = int(now)
    date = extended_time(timestamp)[:10]
    service = options.service or _service(request.host)
    headers = {
        "X-TC-Action": chosen(options.action, "action", "X-TC-Action", request),
        "X-TC-Version": chosen(options.version, "version", "X-TC-Version", request),
        "X-TC-Timestamp": str(timestamp),
    }
    region = _region(options.region, request)
    if region:
        headers["X-TC-Region"] = region
    if not request.header("content-type"):
        headers["Content-Type"] = (
            "application/json" if request.method == "POST" else "application/x-www-form-urlencoded"
        )
    if credentials.token is not None:
        headers["X-TC-Token"] = credentials.token.reveal()
    is_get = request.method == "GET"
    payload = b"" if is_get else request.body or b""
    if options.unsigned_payload:
        headers["X-TC-Content-SHA256"] = UNSIGNED
        payload = UNSIGNED.encode()

    canonical_request = (
        # Whatever the path: all operations of this provider are at `/`.
        f"{request.method}\n/\n{request.query if is_get else ''}\n"
        f"{_canonical_headers(options.signed_headers, request, headers)}\n\n"
        f"{';'.join(options.signed_headers)}\n{sha256(payload).hexdigest()}"
    )
    scope = f"{date}/{service}/{END}"
    canonical_hash = sha256(canonical_request.encode(errors="surrogateescape")).hexdigest()
    string_to_sign = f"{ALGORITHM}\n{timestamp}\n{scope}\n{canonical_hash}"

    key = f"TC3{credentials.secret_key.reveal()}".encode()
    for part in (date, service, END):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, string_to_sign.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"{ALGORITHM} Credential={credentials.secret_id.reveal()}/{scope}, "
        f"SignedHeaders={';'.join(options.signed_headers)}, Signature={signature}"
    )
    steps = {"canonical_request": canonical_request, "string_to_sign": string_to_sign}
    return Signed(headers, steps=steps)


def _service(host: str) -> str:
    found = _SERVICE(host)
    if found is None:
        raise CannotSign(
            "the host does not begin with the name of a service, as SERVICE.tencentcloudapi.com "
            "does: set the option `service` of this upstream's signing"
        )
    return found[1].lower()


def _region(option: str | None, request: Request) -> str | None:
    theirs = request.header("x-tc-region")
    if option == "" and theirs:
        raise CannotSign(
            "no region is to be sent, as the option `region` of this upstream's signing is empty: "
            "leave out the header X-TC-Region"
        )
    return theirs if option is None else option


def _canonical_headers(names: list[str], request: Request, mine: dict[str, str]) -> str:
    """The lines `name:value`: the request's headers with `mine`."""
    found = {name.lower(): value for name, value in mine.items()}
    found["host"] = request.host
    lines = []
    for name in names:
        value = found[name] if name in found else request.header(name)
        if value is None:
            raise CannotSign(
                f"the header {name} is to be signed, as the option `signed_headers` of this "
                "upstream's signing says: send it"
            )
        # In lower case, says the document; yet the SDK signs the content type as it is sent: in
        # the boundary of a multipart body the case matters.
        lines.append(f"{name}:{value if name == 'content-type' else value.lower()}")
    return "\n".join(lines)


def status_of(answer: bytes) -> int | None:
    """What the error of an answer 200 would be elsewhere: 401 for the key's, 429 for limits."""
    found = _ERROR(answer)
    code = found[1].decode() if found is not None else ""
    if code.startswith("AuthFailure."):
        return 401
    return 429 if "LimitExceeded" in code and "Quota" not in code else None


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    own_headers=frozenset({"authorization", "x-tc-timestamp", "x-tc-token", "x-tc-content-sha256"}),
    needs_body=lambda options: not options.unsigned_payload,
    expired=CLOCK_IS_OFF,
    expired_within_200=CLOCK_IS_OFF,
    status_within_200=status_of,
)
