"""`Authorization: Bearer KEY` for Volcengine Ark (Doubao), with keys made of an access key pair.

Ark takes no signature for calls of models: its control plane gives a key for a while, for some
resources, as the provider's SDK (volcenginesdkarkruntime) fetches it. Source: Ark, "GetApiKey",
version 2024-01-01. A long-lived Ark API key needs no exchange: that is scheme `bearer`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeGuard
from urllib.parse import urlsplit

import orjson
from pydantic import Field, StringConstraints

from filters.signers import volcengine
from filters.signers.exchange import (
    LONGEST_LIFE_S,
    LONGEST_TOKEN,
    TokenUrl,
    is_visible,
    sign_as_bearer,
    unix_seconds,
)
from filters.signers.scheme import (
    Exchange,
    Request,
    Scheme,
    TokenRequest,
)
from filters.signers.scheme import Options as BaseOptions
from filters.signers.volcengine import Credentials
from filters.stores.tokens import NoToken, Token

SERVICE = "ark"
ACTION = "Action=GetApiKey&Version=2024-01-01"

RENEW_BEFORE_S = 30 * 60
"""As the SDK; keys that live for less than an hour are renewed halfway."""

ERRORS = frozenset(
    {
        *("MissingParameter", "MissingAuthenticationToken", "MissingRequestInfo"),
        *("MissingSignature", "InvalidTimestamp", "ServiceNotFound", "InvalidActionOrVersion"),
        *("InvalidAccessKey", "SignatureDoesNotMatch", "LackPolicy", "AccessDenied"),
        *("MethodNotAllowed", "InvalidAuthorization", "InvalidCredential", "InvalidSecretToken"),
        *("FlowLimitExceeded", "InternalError", "InternalServiceError", "InternalServiceTimeout"),
        *("ServiceUnavailableTemp", "InvalidParameter", "InvalidParameter.DurationSeconds"),
        *("InvalidParameter.ResourceIds", "InvalidParameter.ResourceType"),
        # Messages.
        "Request is missing Authentication Token.",
        "The request is missing signature.",
        "The signature of the request is expired.",
        "The request signature we calculated does not match the signature you provided. Check your "
        "Secret Access Key and signing method. Consult the service documentation for details.",
        "Request was rejected because of lack of policy.",
        "The specified parameter DurationSeconds is invalid.",
        "The specified parameter ResourceIds is invalid.",
        "The specified parameter ResourceType is invalid.",
    }
)
"""The provider's codes and messages that are told; other messages may name the access key."""


class Options(BaseOptions):
    """What the key is for, and where it is fetched."""

    region: str = Field(default="cn-beijing", pattern=r"^[A-Za-z0-9_-]+$")
    """Of the resources."""
    resource_type: Literal["endpoint", "presetendpoint", "bot"] = "endpoint"
    """What `resource_ids` are."""
    resource_ids: list[Annotated[str, StringConstraints(pattern=r"^[!-~]+$")]] = Field(min_length=1)
    """The key is good for these alone, such as `ep-20240101000000-abcde`: all that models of this
    upstream name."""
    duration_seconds: int = Field(default=7 * 24 * 3600, ge=60, le=LONGEST_LIFE_S)
    """How long a key is asked for; the next one is fetched 30 minutes before its end."""
    token_url: TokenUrl = "https://open.volcengineapi.com/"
    """The control plane."""


def request_key(credentials: Credentials, options: Options, now: float) -> TokenRequest:
    """The signed request for a key."""
    body = orjson.dumps(
        {
            "DurationSeconds": options.duration_seconds,
            "ResourceType": options.resource_type,
            "ResourceIds": options.resource_ids,
        }
    )
    parts = urlsplit(options.token_url)
    content_type = ("content-type", "application/json")
    request = Request("POST", parts.netloc, parts.path, ACTION, (content_type,), body)
    scope = volcengine.Options(region=options.region, service=SERVICE)
    signed = volcengine.sign(request, credentials, scope, now, "")
    # The host as it was signed, whatever the client makes of the port.
    headers = {"Host": parts.netloc, "Content-Type": content_type[1], **signed.headers}
    return TokenRequest("POST", f"{options.token_url}?{ACTION}", headers, body)


def read_key(status: int, body: bytes, now: float) -> Token:
    """The key in an answer. Raises `NoToken`, which tells what of `ERRORS` the answer holds."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise NoToken(f"GetApiKey was answered {status} without JSON") from None
    error = _inner(_inner(answer, "ResponseMetadata"), "Error")
    if error:
        told = [each for each in (error.get("Code"), error.get("Message")) if _is_known(each)]
        raise NoToken(": ".join([f"GetApiKey was answered {status}", *told]))
    result = _inner(answer, "Result")
    if status != 200 or not result:
        raise NoToken(f"GetApiKey was answered {status} without a key")
    return _token(result, now)


def _token(result: dict[str, Any], now: float) -> Token:
    key, expired_time = result.get("ApiKey"), result.get("ExpiredTime")
    if not isinstance(key, str) or len(key) > LONGEST_TOKEN or not is_visible(key):
        raise NoToken("GetApiKey was answered with an ApiKey that cannot be sent")
    end = unix_seconds(expired_time)
    if end is None:
        raise NoToken("GetApiKey was answered without a time in ExpiredTime")
    # Not trusted beyond what can be: a key that is refused is replaced before its time.
    life_s = min(end - now, LONGEST_LIFE_S)
    if life_s <= 0:
        raise NoToken("GetApiKey was answered with a key that has expired already")
    expires_at = now + life_s
    return Token(key, expires_at - min(RENEW_BEFORE_S, life_s / 2), expires_at)


def _inner(value: object, name: str) -> dict[str, Any]:
    """The object called `name` in `value`; empty when there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _is_known(told: object) -> TypeGuard[str]:
    return isinstance(told, str) and told in ERRORS


SCHEME = Scheme(
    sign=sign_as_bearer,
    Credentials=Credentials,
    Options=Options,
    # No code says that a key is too old: it is answered 401 like any other that is not good.
    exchange=Exchange(request=request_key, read=read_key, expired=volcengine.SCHEME.expired),
)
