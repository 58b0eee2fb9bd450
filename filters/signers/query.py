"""The key in a query parameter. Prefer headers: keys in URLs turn up in logs on the way."""

from __future__ import annotations

from pydantic import Field

from filters.signers.bearer import Credentials
from filters.signers.scheme import Options as Base
from filters.signers.scheme import Request, Scheme, Signed, with_parameters


class Options(Base):
    """Which parameter; what a caller sends of that name is replaced."""

    name: str = Field(default="key", min_length=1)


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    return Signed({}, with_parameters(request.query, {options.name: credentials.key.reveal()}))


SCHEME = Scheme(sign=sign, Credentials=Credentials, Options=Options)
