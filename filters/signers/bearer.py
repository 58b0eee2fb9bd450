"""`Authorization: Bearer KEY` (RFC 6750): OpenAI, DeepSeek, Moonshot, DashScope, Ark, most others.

The key may be several parts that the provider joins by a colon, such as iFlytek's
`APIKey:APISecret`.
"""

from __future__ import annotations

from pydantic import field_validator

from filters.signers.scheme import Credentials as Base
from filters.signers.scheme import Options, Request, Scheme, Signed
from sidecar.api import Secret, sendable_value


class Credentials(Base):
    """The API key."""

    key: Secret

    @field_validator("key")
    @classmethod
    def _can_be_sent(cls, key: Secret) -> Secret:
        sendable_value(key.reveal())
        return key


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    return Signed({"Authorization": f"Bearer {credentials.key.reveal()}"})


SCHEME = Scheme(is_fixed=True, sign=sign, Credentials=Credentials)
