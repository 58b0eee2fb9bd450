"""What exchanges of credentials for a token share: where one is fetched, and reading what comes.

Answers are trusted with nothing: a token that could not be sent is refused, and of an error only
words that are known are told, for a provider may repeat in it what it was sent.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
from pydantic import AfterValidator

from filters.signers.scheme import Options, Request, Signed
from filters.stores.tokens import NoToken, Token
from sidecar.api import is_forbidden, literal

LONGEST_TOKEN = 4096
"""Characters."""
LONGEST_LIFE_S = 30 * 24 * 3600
"""A token that is said to live longer is renewed after that time all the same."""

_VISIBLE = re.compile(r"[!-~]+").fullmatch


def is_visible(text: str) -> bool:
    """Whether `text` is visible ASCII (RFC 6749, appendix A), at least one character of it."""
    return _VISIBLE(text) is not None


def _plain_url(url: str) -> str:
    how_to = "write https://host/path, without user, query and fragment"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # brackets around what is no address; a port that is none
        raise ValueError(how_to) from None
    if (
        not is_visible(url)
        or any(each in url for each in "?#@\\")
        or parts.scheme not in ("https", "http")
        or not host
        or port == 0
    ):
        raise ValueError(how_to)
    address = literal(host)
    if address is not None and is_forbidden(address):
        raise ValueError(
            f"{address} is link-local or a cloud's metadata service, and no credentials go there: "
            "choose another"
        )
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path or '/'}"


TokenUrl = Annotated[str, AfterValidator(_plain_url)]
"""Where a token is fetched. `http://` is for networks that nobody else listens on. A host that is
an address is judged here, one that is a name when it is looked up."""


def read_token(
    name: str, status: int, body: bytes, errors: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """The token called `name` in an answer, and all fields of it.

    A token is visible ASCII (RFC 6749, appendix A.12). Raises `NoToken`, which tells those of
    the answer's texts that stand in `errors`.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise NoToken(f"instead of a token came status {status} without a JSON object")
    token = fields.get(name)
    if not 200 <= status < 300 or token is None:
        told = [each for each in fields.values() if isinstance(each, str) and each in errors]
        raise NoToken(": ".join([f"instead of a token came status {status}", *told]))
    if not isinstance(token, str) or len(token) > LONGEST_TOKEN or not is_visible(token):
        raise NoToken(f"the {name} that came cannot be sent")
    return token, fields


def sign_as_bearer(
    request: Request, token: Token, options: Options, now: float, nonce: str
) -> Signed:
    """The signer of schemes whose token is a bearer's (RFC 6750)."""
    return Signed({"Authorization": f"Bearer {token.value}"})


def unix_seconds(time: object) -> float | None:
    """Of a time in an answer: Unix seconds, or ISO 8601, in UTC unless it says otherwise."""
    if isinstance(time, int | float) and not isinstance(time, bool):
        return float(time)
    if not isinstance(time, str):
        return None
    try:
        moment = datetime.fromisoformat(time)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
