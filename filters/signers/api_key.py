"""Azure OpenAI: the key in the header `api-key`.

Source: Azure OpenAI REST reference, authentication. Entra ID tokens go by `bearer`.
"""

from __future__ import annotations

from filters.signers.bearer import Credentials
from filters.signers.scheme import Options, Request, Scheme, Signed


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    return Signed({"api-key": credentials.key.reveal()})


SCHEME = Scheme(is_fixed=True, sign=sign, Credentials=Credentials)
