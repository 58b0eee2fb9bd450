"""The key alone in a header: Anthropic's `x-api-key`, and whatever another server wants."""

from __future__ import annotations

from filters.signers.bearer import Credentials
from filters.signers.scheme import Options as Base
from filters.signers.scheme import Request, Scheme, Signed
from sidecar.api import HeaderName


class Options(Base):
    """Which header."""

    name: HeaderName = "x-api-key"


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    return Signed({options.name: credentials.key.reveal()})


SCHEME = Scheme(is_fixed=True, sign=sign, Credentials=Credentials, Options=Options)
