"""iFlytek's HMAC signature, in the URL or in headers: embeddings and other APIs of its platform.

Source: iFlytek, "URL authentication" (general and HTTP), and the provider's SDK (xfyunsdkcore) for
headers. Spark's chat takes no signature over HTTP but a password: that is scheme `bearer`.
"""

from __future__ import annotations

import base64
import hmac
from email.utils import formatdate
from hashlib import sha256
from math import floor
from typing import Literal
from urllib.parse import quote_plus

from pydantic import field_validator

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import Request, Scheme, Signed, with_parameters
from sidecar.api import Secret, sendable_value

CLOCK_IS_OFF = (b"a valid date or x-date header is required",)
"""The gateway's message (of a 403) for more than 300 s. It begins as those for wrong keys do:
"HMAC signature cannot be verified, …" or "HMAC signature does not match, …"."""


class Credentials(BaseCredentials):
    """Both from the console, beside the application's id."""

    api_key: Secret
    api_secret: Secret

    @field_validator("api_key")
    @classmethod
    def _can_be_quoted(cls, key: Secret) -> Secret:
        if any(each in '"\\' for each in sendable_value(key.reveal())):
            raise ValueError("an API key of this provider has no quotation mark and no backslash")
        return key


class Options(BaseOptions):
    """Where the signature goes."""

    mode: Literal["url-query", "header-digest"] = "url-query"
    """`url-query`: as parameters `authorization`, `host` and `date`; the body is not signed.
    `header-digest`: as headers, over the body too. The page of each API says which it takes."""


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    # Its names of days and months are English under any locale.
    date = formatdate(floor(now), usegmt=True)
    names = "host date request-line"
    # The request line has no query here.
    string_to_sign = f"host: {request.host}\ndate: {date}\n{request.method} {request.path} HTTP/1.1"
    if options.mode == "url-query":
        origin = _authorization(credentials, names, string_to_sign)
        authorization = _base64(origin.encode())
        mine = {"authorization": authorization, "host": request.host, "date": date}
        headers, query = {}, with_parameters(request.query, mine, quote_plus)
    else:
        digest = f"SHA-256={_base64(sha256(request.body or b'').digest())}"
        string_to_sign += f"\ndigest: {digest}"
        origin = _authorization(credentials, f"{names} digest", string_to_sign)
        headers = {"Host": request.host, "Date": date, "Digest": digest, "Authorization": origin}
        query = None
    return Signed(
        headers, query, steps={"string_to_sign": string_to_sign, "authorization_origin": origin}
    )


def _authorization(credentials: Credentials, names: str, string_to_sign: str) -> str:
    key = credentials.api_secret.reveal().encode()
    text = string_to_sign.encode(errors="surrogateescape")
    signature = _base64(hmac.digest(key, text, "sha256"))
    return (
        f'api_key="{credentials.api_key.reveal()}", algorithm="hmac-sha256", '
        f'headers="{names}", signature="{signature}"'
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    # The gateway would look at `x-date` before `date`.
    own_headers=frozenset({"authorization", "date", "digest", "x-date"}),
    needs_body=lambda options: bool(options.mode == "header-digest"),
    expired=CLOCK_IS_OFF,
)
