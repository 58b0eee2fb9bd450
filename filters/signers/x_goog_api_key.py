"""Google Gemini: the key in the header `x-goog-api-key`, which keeps it out of URLs.

Source: Gemini API reference, authentication. Its OpenAI-compatible paths take `bearer`.
"""

from __future__ import annotations

from filters.signers.bearer import Credentials
from filters.signers.scheme import Options, Request, Scheme, Signed, parameters


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    headers = {"x-goog-api-key": credentials.key.reveal()}
    parts = [each for each in request.query.split("&") if each]
    kept = [each for each in parts if parameters(each)[0][0] != "key"]
    # The other way to send a key, which would be the client's own.
    return Signed(headers, None if kept == parts else "&".join(kept))


SCHEME = Scheme(sign=sign, Credentials=Credentials)
