"""Google Gemini: the key in the header `x-goog-api-key`, which keeps it out of URLs.

Source: Gemini API reference, authentication. Its OpenAI-compatible paths take `bearer`.
"""

from __future__ import annotations

from filters.signers.bearer import Credentials
from filters.signers.scheme import Options, Request, Scheme, Signed


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    return Signed({"x-goog-api-key": credentials.key.reveal()})


SCHEME = Scheme(is_fixed=True, sign=sign, Credentials=Credentials)
