"""`Authorization: Bearer JWT`: Zhipu's own tokens, made from an API key `id.secret`.

Source: the provider's SDK (zhipuai, `core/_jwt_token.py`). The key itself never goes on the wire;
scheme `bearer` sends it as it is, which the provider takes too.
"""

from __future__ import annotations

import base64
import json

from jwt import InvalidKeyError, PyJWS
from jwt.algorithms import HMACAlgorithm
from pydantic import Field, field_validator

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import Request, Scheme, Signed
from sidecar.api import Secret

RENEW_BEFORE_S = 30.0
"""As the SDK: a token of 210 s is used for 180 s."""

TOKEN_HAS_EXPIRED = (b'"1003"',)
"""The provider's `error.code`. The token was new, so one of the clocks is off."""


class Hs256(HMACAlgorithm):
    """HMAC with keys of any length: the provider's are shorter than the hash, and PyJWT would warn
    of each."""

    def __init__(self) -> None:
        super().__init__(HMACAlgorithm.SHA256)

    def check_key_length(self, key: bytes) -> None:
        return None


HS256 = Hs256()
JWS = PyJWS(algorithms=())
JWS.register_algorithm("HS256", HS256)


class Credentials(BaseCredentials):
    """The API key, in two parts."""

    api_key: Secret
    """`id.secret`, as the provider's console shows it."""

    @field_validator("api_key")
    @classmethod
    def _has_two_parts(cls, key: Secret) -> Secret:
        parts = key.reveal().split(".")
        if len(parts) != 2 or not all(parts):
            raise ValueError("an API key of this provider is id.secret, with one dot")
        try:
            HS256.prepare_key(parts[1])
        except InvalidKeyError:
            raise ValueError("the part behind the dot is a key of some other kind") from None
        return key


class Options(BaseOptions):
    """How long a token is good."""

    ttl_ms: int = Field(default=210_000, ge=1)
    """It is replaced 30 s before; one of 30 s or less is made for each attempt."""


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    name, _, secret = credentials.api_key.reveal().partition(".")
    now_ms = round(now * 1000)
    payload = {"api_key": name, "exp": now_ms + options.ttl_ms, "timestamp": now_ms}
    payload_json = json.dumps(payload, separators=(",", ":"))
    token = JWS.encode(payload_json.encode(), secret, "HS256", {"sign_type": "SIGN"})
    signing_input = token.rpartition(".")[0]
    header = base64.urlsafe_b64decode(signing_input.partition(".")[0] + "==")
    return Signed(
        {"Authorization": f"Bearer {token}"},
        steps={
            "header_json": header.decode(),
            "payload_json": payload_json,
            "signing_input": signing_input,
        },
        good_until=(now_ms + options.ttl_ms) / 1000 - RENEW_BEFORE_S,
    )


SCHEME = Scheme(sign=sign, Credentials=Credentials, Options=Options, expired=TOKEN_HAS_EXPIRED)
