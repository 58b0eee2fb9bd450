"""`?access_token=…`: Baidu Qianfan v1 by an application's API key and secret key.

Source: Baidu AI Cloud, "Get access_token" (`WENXINWORKSHOP/s/Ilkkrb0i5`) and "Authentication"
(`WENXINWORKSHOP/s/Dlkm79mnx`). Both secrets go in the query of the token's address, for that is the
only place the documentation has for them.
"""

from __future__ import annotations

from filters.signers.bce_auth_v1 import qianfan_status
from filters.signers.exchange import LONGEST_LIFE_S, TokenUrl, read_token
from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import (
    Exchange,
    Request,
    Scheme,
    Signed,
    TokenRequest,
    with_parameters,
)
from filters.signers.scheme import Options as BaseOptions
from filters.stores.tokens import NoToken, Token
from sidecar.api import Secret

RENEW_BEFORE_S = 3600.0
"""A token of less than ten hours is renewed in the last tenth of its life."""

ERRORS = frozenset(
    {
        # RFC 6749, 5.2.
        *("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client"),
        *("unsupported_grant_type", "invalid_scope"),
        # The provider's descriptions: the wrong client_id, the wrong client_secret.
        *("unknown client id", "Client authentication failed"),
    }
)

TOKEN_IS_REFUSED = (
    # Invalid, and expired; answers have status 200.
    *(b'"error_code":110', b'"error_code": 110'),
    *(b'"error_code":111', b'"error_code": 111'),
)


class Credentials(BaseCredentials):
    """What the provider's console calls API Key and Secret Key of an application."""

    client_id: Secret
    client_secret: Secret


class Options(BaseOptions):
    """Where the token is fetched."""

    token_url: TokenUrl = "https://aip.baidubce.com/oauth/2.0/token"


def request_token(credentials: Credentials, options: Options, now: float) -> TokenRequest:
    query = with_parameters(
        "",
        {
            "grant_type": "client_credentials",
            "client_id": credentials.client_id.reveal(),
            "client_secret": credentials.client_secret.reveal(),
        },
    )
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    return TokenRequest("POST", f"{options.token_url}?{query}", headers)


def token_of(status: int, body: bytes, now: float) -> Token:
    token, fields = read_token("access_token", status, body, ERRORS)
    life_s = fields.get("expires_in")
    if isinstance(life_s, bool) or not isinstance(life_s, int | float) or life_s <= 0:
        raise NoToken("a token came whose expires_in is no number of seconds")
    life_s = min(life_s, LONGEST_LIFE_S)
    expires_at = now + life_s
    return Token(token, expires_at - min(RENEW_BEFORE_S, life_s / 10), expires_at)


def sign(request: Request, token: Token, options: Options, now: float, nonce: str) -> Signed:
    return Signed({}, with_parameters(request.query, {"access_token": token.value}))


SCHEME = Scheme(
    sign=sign,
    Credentials=Credentials,
    Options=Options,
    status_within_200=qianfan_status,
    exchange=Exchange(request=request_token, read=token_of, refused=TOKEN_IS_REFUSED),
)
