"""`Authorization: bce-auth-v1/…`: Baidu AI Cloud's signature, for Qianfan and whatever else it has.

Source: Baidu AI Cloud, "Authentication mechanism" (API reference, `s/njwvz1yfu`). The body is no
part of what is signed.
"""

from __future__ import annotations

import hmac
import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import (
    Request,
    Scheme,
    SendableSecret,
    Signed,
    encode,
    encode_path,
    encoded_parameters,
    extended_time,
    parameters,
)
from sidecar.api import Secret

VERSION = "bce-auth-v1"
PREFIX = "x-bce-"
"""Headers that are signed whether or not they are listed."""
DEFAULT_SET = frozenset({"host", "content-length", "content-type", "content-md5"})
"""What an empty list in `Authorization` stands for, together with every `x-bce-*`."""

ALL = frozenset({"host", "content-type"})
"""The same that are signed, and listed, unless something else is said."""

_ERROR_CODE = re.compile(rb'"error_code"\s*:\s*([0-9]{1,9})').search
_STATUS_OF = {4: 429, 14: 401, 18: 429, 336501: 429, 336502: 429}
"""Cluster, QPS, RPM and TPM limits; an access key that IAM does not know."""

WHITE_SPACE = " \t\n\r\v\f"
"""Of ASCII alone: `str.strip` takes a no-break space for white space too, other signers do not."""


class Credentials(BaseCredentials):
    """An access key pair, or a temporary one of STS: then with `security_token`."""

    access_key_id: SendableSecret
    secret_access_key: Secret
    security_token: SendableSecret | None = None


class Options(BaseOptions):
    """How long a signature is good, and what it covers."""

    expiration_seconds: int = Field(default=1800, ge=1)
    """From the time of signing: a clock of ours that is late by more makes requests that have
    expired when they arrive."""
    signed_headers: (
        Literal["all"]
        | list[Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]]
        | None
    ) = "all"
    """`all`: `content-type`, as far as there is one, `host` and every `x-bce-*`. A list: those, and
    every request should have them. null: the provider's default set, which has `content-length`
    and `content-md5` too, and is not written out."""

    @field_validator("signed_headers")
    @classmethod
    def _are_lower_case(cls, names: str | list[str] | None) -> str | list[str] | None:
        if not isinstance(names, list):
            return names
        if not names:
            raise ValueError("name at least `host`, or write null for the provider's default set")
        return sorted({name.lower() for name in names})


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    date = extended_time(now)
    headers = {"x-bce-date": date}
    if credentials.security_token is not None:
        headers["x-bce-security-token"] = credentials.security_token.reveal()

    names, header_lines = _canonical_headers(request, headers, options.signed_headers)
    query = _without_authorization(request.query)
    canonical_request = (
        f"{request.method}\n{encode_path(request.path)}\n{_canonical_query(query)}\n{header_lines}"
    )
    prefix = f"{VERSION}/{credentials.access_key_id.reveal()}/{date}/{options.expiration_seconds}"
    secret = credentials.secret_access_key.reveal()
    # The next key is these 64 hex digits themselves, not the bytes that they spell.
    signing_key = _hmac(secret, prefix)
    headers["Authorization"] = f"{prefix}/{names}/{_hmac(signing_key, canonical_request)}"
    return Signed(
        headers,
        None if query == request.query else query,
        steps={"signing_key": signing_key, "canonical_request": canonical_request},
    )


def _hmac(key: str, text: str) -> str:
    """HMAC-SHA256 in hex."""
    data = text.encode(errors="surrogateescape")
    return hmac.digest(key.encode(errors="surrogateescape"), data, "sha256").hex()


def _canonical_headers(
    request: Request, mine: dict[str, str], listed: str | list[str] | None
) -> tuple[str, str]:
    """The names for `Authorization`, and the lines `name:value`: of the request's headers those to
    be signed, with `mine`. A header with an empty value does not count. Every `x-bce-*` is signed,
    listed or not, as the provider's SDK does it."""
    wanted = listed if isinstance(listed, list) else DEFAULT_SET if listed is None else ALL
    found = {"host": [request.host]} if "host" in wanted else {}
    for name, value in request.headers:
        if name in wanted or name.startswith(PREFIX):
            found.setdefault(name, []).append(value.strip(WHITE_SPACE))
    for name, value in mine.items():
        found[name] = [value.strip(WHITE_SPACE)]
    values = {name: value for name in found if (value := ",".join(found[name]))}
    # By the whole line, as the provider has it: `x-bce-a-b:` comes before `x-bce-a:`.
    lines = sorted([f"{encode(name)}:{encode(value)}" for name, value in values.items()])
    if isinstance(listed, list):
        names = ";".join(listed)
    else:
        names = "" if listed is None else ";".join(sorted(values))
    return names, "\n".join(lines)


def _canonical_query(query: str) -> str:
    """Sorted by the whole `name=value`, as the provider has it: `a1=` comes before `a=`."""
    return "&".join(sorted([f"{name}={value}" for name, value in encoded_parameters(query)]))


def _without_authorization(query: str) -> str:
    """`query` without the parameter that signs a URL: a credential of the caller.

    The documentation leaves it out of what is signed and the provider's SDK does not: once it is
    gone, both sign alike.
    """
    if all(name.lower() != "authorization" for name, _ in parameters(query)):
        return query
    return "&".join(
        [
            each
            for each in query.split("&")
            if all(name.lower() != "authorization" for name, _ in parameters(each))
        ]
    )


def qianfan_status(answer: bytes) -> int | None:
    """What the error of a Qianfan v1 answer, which is a 200, would be elsewhere."""
    found = _ERROR_CODE(answer)
    return _STATUS_OF.get(int(found[1])) if found is not None else None


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    # A content hash of the caller's is of the body as it was before our filters.
    own_headers=frozenset(
        {"authorization", "x-bce-content-sha256", "x-bce-date", "x-bce-security-token"}
    ),
    expired=(b"RequestExpired",),
    status_within_200=qianfan_status,
)
