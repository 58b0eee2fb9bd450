"""`Authorization: Bearer KEY` (RFC 6750): OpenAI, DeepSeek, Moonshot, DashScope, Ark, most others.

The key may be several parts that the provider joins by a colon, such as iFlytek's
`APIKey:APISecret`.
"""

from __future__ import annotations

import re

from pydantic import field_validator

from filters.signers.scheme import Credentials as Base
from filters.signers.scheme import Options, Request, Scheme, Signed
from sidecar.api import Secret

_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?").fullmatch
_TOKEN = re.compile(r"[!-~]+").fullmatch


class Credentials(Base):
    """The API key, as any header can carry it: visible ASCII, spaces within (RFC 9110, 5.5)."""

    key: Secret

    @field_validator("key")
    @classmethod
    def _can_be_sent(cls, key: Secret) -> Secret:
        if not _VALUE(key.reveal()):
            raise ValueError(
                "the key has a character that no header carries: a key is visible ASCII"
            )
        return key


class BearerCredentials(Credentials):
    """The API key: a token has no spaces either (RFC 6750, 2.1)."""

    @field_validator("key")
    @classmethod
    def _is_a_token(cls, key: Secret) -> Secret:
        if not _TOKEN(key.reveal()):
            raise ValueError(
                "the key has a space, which no bearer token has: leave out the word Bearer, which "
                "is put before it"
            )
        return key


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    return Signed({"Authorization": f"Bearer {credentials.key.reveal()}"})


SCHEME = Scheme(is_fixed=True, sign=sign, Credentials=BearerCredentials)
