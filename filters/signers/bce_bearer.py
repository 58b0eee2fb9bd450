"""`Authorization: Bearer TOKEN` for Baidu Qianfan v2, with tokens made of an access key pair.

Source: Baidu AI Cloud, "Get BearerToken" (`WENXINWORKSHOP/s/vm40x9q45`), and the provider's SDK
(qianfan). A long-lived API key of Qianfan needs no exchange: that is scheme `bearer`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field

from filters.signers import bce_auth_v1
from filters.signers.bce_auth_v1 import Credentials
from filters.signers.exchange import (
    LONGEST_LIFE_S,
    TokenUrl,
    read_token,
    sign_as_bearer,
    unix_seconds,
)
from filters.signers.scheme import (
    Exchange,
    Request,
    Scheme,
    TokenRequest,
)
from filters.signers.scheme import Options as BaseOptions
from filters.stores.tokens import NoToken, Token

ERRORS = frozenset(
    {
        *("AccessDenied", "InternalError", "InvalidAccessKeyId", "InvalidHTTPAuthHeader"),
        *("InvalidHTTPRequest", "InvalidURI", "OptInRequired", "RequestExpired"),
        *("ServiceUnavailable", "SignatureDoesNotMatch"),
    }
)
"""Of the provider's common codes those that an exchange can be answered with."""

SIGNED = bce_auth_v1.Options()


class Options(BaseOptions):
    """Where the token is fetched, and for how long."""

    token_url: TokenUrl = "https://iam.bj.baidubce.com/v1/BCE-BEARER/token"
    """Of the provider's IAM."""
    expire_in_seconds: int = Field(default=43_200, ge=60, le=LONGEST_LIFE_S)
    """What is asked for; the provider gives none for longer than 30 days. A token is renewed in the
    last tenth of its life."""


def request_token(credentials: Credentials, options: Options, now: float) -> TokenRequest:
    """The signed request for a token."""
    parts = urlsplit(options.token_url)
    query = f"expireInSeconds={options.expire_in_seconds}"
    request = Request("GET", parts.netloc, parts.path, query, (), b"")
    signed = bce_auth_v1.sign(request, credentials, SIGNED, now, "")
    # The host as it was signed, whatever the client makes of the port.
    headers = {"Host": parts.netloc, **signed.headers}
    return TokenRequest("GET", f"{options.token_url}?{query}", headers)


def token_of(status: int, body: bytes, now: float) -> Token:
    token, fields = read_token("token", status, body, ERRORS)
    if fields.get("status") == "disable":
        raise NoToken("the token that came is disabled")
    created, end = unix_seconds(fields.get("createTime")), unix_seconds(fields.get("expireTime"))
    if end is None:
        raise NoToken("a token came without a time in expireTime")
    # The provider's own two times do not depend on our clock; ours knows a token that is not new.
    life_s = min(end - now, LONGEST_LIFE_S if created is None else end - created, LONGEST_LIFE_S)
    if life_s <= 0:
        raise NoToken("a token came that has expired already")
    expires_at = now + life_s
    return Token(token, expires_at - life_s / 10, expires_at)


SCHEME = Scheme(
    sign=sign_as_bearer,
    Credentials=Credentials,
    Options=Options,
    # No code is needed: a token that is not good any more is answered 401.
    exchange=Exchange(request=request_token, read=token_of, expired=bce_auth_v1.SCHEME.expired),
)
