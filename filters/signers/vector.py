"""One request as JSON, signed: what `sidecar sign` does, and how published vectors are tested.

{"scheme": "TC3-HMAC-SHA256",
 "credentials": {"secret_id": "env:ID", "secret_key": "file:key"},
 "clock": {"iso": "2024-07-01T08:00:00Z"}, "nonce": null,
 "options": {"service": "hunyuan", "action": "ChatCompletions", "version": "2023-09-01"},
 "request": {"method": "POST", "url": "https://hunyuan.tencentcloudapi.com/",
             "headers": [["Content-Type", "application/json"]], "body": "{}"}}
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, cast, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from filters.signers import SCHEMES, find
from filters.signers.scheme import CannotSign, Request, Scheme
from filters.signers.settings import SchemeName, SignSettings
from sidecar.api import FilterConfig, Secret

REFERENCE = re.compile(r"(env|file|exec):").match
"""A credential that begins otherwise is the secret itself."""

COMMENTS = frozenset({"note", "compare"})
ABOUT = frozenset({"id", "description", "origin", "expected", "independently_recomputed"})
"""Keys that vectors have for people: in credentials and options, and at the top."""

EXCHANGES = {
    "bce-bearer": "GET of its token_url is signed by the scheme bce-auth-v1",
    "volcengine-ark": "POST to its token_url is signed by the scheme volcengine-HMAC-SHA256 with "
    'the service "ark"',
    "baidu-oauth": "POST to its token_url carries both secrets and is not signed",
}
"""For the schemes with an exchange: what can be looked at instead."""

HALF = "it holds half a character (a lone surrogate)"

# The JSON


def _wire_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets around what is no address
        parts = None
    if not parts or not parts.scheme or not parts.netloc or "@" in parts.netloc or "#" in url:
        raise ValueError("write scheme://host/path?query, as it goes on the wire")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise ValueError("percent-encode it, as it goes on the wire")
    return url


def _pairs(headers: Any) -> Any:
    if headers is None:
        return []
    is_right = isinstance(headers, list) and all(
        isinstance(pair, list) and [type(each) for each in pair] == [str, str] for pair in headers
    )
    if not is_right:
        raise ValueError('write a list of ["name", "value"] pairs')
    return headers


def _text_or_null(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise ValueError("write it as text, or null")
    return value


def _whole(text: str) -> str:
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(HALF)
    return text


Text = Annotated[str, AfterValidator(_whole)]
TextOrNull = Annotated[Text | None, BeforeValidator(_text_or_null)]


class RequestVector(FilterConfig):
    """A request exactly as it goes on the wire, but for what signing adds."""

    method: Text
    url: Annotated[str, AfterValidator(_wire_url)]
    headers: Annotated[list[list[Text]], BeforeValidator(_pairs)] = []
    body: TextOrNull = None
    body_repeat: int = Field(default=1, ge=0)
    """The body is `body` so many times."""


def _unix_seconds(clock: Any) -> Any:
    """Of `{"unix_ms": …}`, `{"unix": …}` or `{"iso": …}`."""
    if clock is None:
        return None
    try:
        if "unix_ms" in clock:
            seconds = clock["unix_ms"] / 1000
        elif "unix" in clock:
            seconds = float(clock["unix"])
        else:
            moment = datetime.fromisoformat(clock["iso"])
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)  # the years that there are
        return float(seconds)
    except (KeyError, OverflowError, TypeError, ValueError):
        pass
    raise ValueError('write {"unix": seconds} or {"iso": "2024-07-01T08:00:00Z"}')


class Vector(FilterConfig):
    """What to sign, and when."""

    clock: Annotated[float | None, BeforeValidator(_unix_seconds)] = None
    nonce: TextOrNull = None
    request: RequestVector

    @model_validator(mode="before")
    @classmethod
    def _is_an_object(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object with scheme, credentials and request")
        return values


class UpstreamVector(Vector):
    """The same where an upstream's settings say how."""

    @model_validator(mode="before")
    @classmethod
    def _says_nothing_of_the_settings(cls, values: Any) -> Any:
        for name in ("scheme", "credentials", "options"):
            if isinstance(values, dict) and name in values:
                raise ValueError(f"`{name}` comes from the configuration: take it out")
        return values


class WholeVector(Vector):
    """What to sign, when, and how. Of a scheme that is known: a subclass by `_whole_vector`."""

    scheme: SchemeName
    credentials: Any
    options: Any = None


@cache
def _whole_vector(name: str) -> type[WholeVector]:
    scheme = find(name)
    fields: dict[str, Any] = {
        "credentials": (scheme.Credentials, ...),
        "options": (scheme.Options, ...),
    }
    return cast(type[WholeVector], create_model("WholeVector", __base__=WholeVector, **fields))


def _in_full(values: dict[str, Any], scheme: Scheme) -> dict[str, Any]:
    """With options, and without what is for people or means the same as no such key: null where it
    has no meaning of its own, and an empty token. A credential that is no reference is a secret."""
    full = {"options": {}, **{key: each for key, each in values.items() if each is not None}}
    for part, model in (("credentials", scheme.Credentials), ("options", scheme.Options)):
        if isinstance(fields := full.get(part), dict):
            full[part] = {
                key: value
                for key, value in fields.items()
                if key not in COMMENTS and not (value is None and _is_set(model, key))
            }
    if isinstance(fields := full.get("credentials"), dict):
        full["credentials"] = {
            key: Secret(value) if isinstance(value, str) and not REFERENCE(value) else value
            for key, value in fields.items()
            if value != "" or _is_set(scheme.Credentials, key)
        }
    return full


def _is_set(model: type[FilterConfig], key: str) -> bool:
    """Whether `model` knows `key`, and not as something that may be null."""
    field = model.model_fields.get(key)
    return field is not None and type(None) not in get_args(field.annotation)


# Signing it


class BadVector(ValueError):
    """The JSON does not say what to sign."""


class BadFields(BadVector):
    """`model` has refused `values` with `error`; its text is what pydantic says of each place."""

    def __init__(self, error: ValidationError, model: type[BaseModel], values: Any) -> None:
        lines = []
        for each in error.errors(include_url=False, include_input=False):
            message = each["msg"].removeprefix("Value error, ")
            message = {"missing": "is missing"}.get(each["type"], message)
            lines.append(f"{'.'.join(map(str, each['loc']))}: {message}")
        super().__init__("\n".join(lines))
        self.error = error
        self.model = model
        self.values = values


def sign_vector(
    values: Any,
    *,
    now: float,
    nonce: str,
    references: object = None,
    settings: SignSettings | None = None,
) -> dict[str, Any]:
    """Sign the request that `values` describe.

    `now` (Unix seconds) and `nonce` are for a vector without `clock` or `nonce`; `references`
    resolve the credentials that are written as `env:NAME` or `file:PATH`; with `settings`, the
    first of their keys signs. The result is `{"headers": {name: value}, "url": str,
    "intermediate": {step: text}}`, where `headers` are those added, or set to another value than
    the request had. Raises `BadVector`, and `CannotSign` when the request lacks what the scheme
    signs.
    """
    if settings is not None:
        name: Any = settings.scheme
    else:
        name = values.get("scheme") if isinstance(values, dict) else None
    scheme = find(name) if isinstance(name, str) and name in SCHEMES else None
    if scheme is not None and scheme.exchange is not None:
        raise BadVector(
            f"scheme: {name} signs with a token that has to be fetched, which is not done here; "
            f"the {EXCHANGES[name]}"
        )
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in ABOUT}
    if settings is not None:
        model: type[Vector] = UpstreamVector
    elif scheme is None:
        model = WholeVector
    else:
        model, values = _whole_vector(name), _in_full(values, scheme)
    try:
        vector = model.model_validate(values, context=references)
    except ValidationError as error:
        raise BadFields(error, model, values) from None
    assert scheme is not None
    if isinstance(vector, WholeVector):
        credentials, options = vector.credentials, vector.options
    else:
        assert settings is not None
        credentials, options = settings.keys[0], settings
    now = now if vector.clock is None else vector.clock
    try:
        return _sign(scheme, vector.request, credentials, options, now, vector.nonce or nonce)
    except UnicodeEncodeError:
        pass
    raise BadVector(f"credentials or options: {HALF}")  # outside: the error has the text


def _sign(
    scheme: Scheme, sent: RequestVector, credentials: Any, options: Any, now: float, nonce: str
) -> dict[str, Any]:
    parts = urlsplit(sent.url)
    url = f"{parts.scheme}://{parts.netloc}{parts.path or '/'}"
    given: dict[str, list[str]] = {}
    for name, value in sent.headers:
        given.setdefault(name.lower(), []).append(value)
    request = Request(
        method=sent.method.upper(),
        host=given.get("host", [parts.netloc])[0].strip(" \t"),
        path=parts.path or "/",
        query=parts.query,
        headers=tuple(
            (name.lower(), value)
            for name, value in sent.headers
            if name.lower() not in scheme.own_headers and name.lower() != "host"
        ),
        body=(sent.body or "").encode() * sent.body_repeat,
        url_scheme={"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme),
    )
    signed = scheme.sign(request, credentials, options, now, nonce)
    query = request.query if signed.query is None else signed.query
    return {
        "headers": {
            name: value
            for name, value in signed.headers.items()
            if name == "Host" or given.get(name.lower()) != [value]
        },
        "url": f"{url}?{query}" if query else url,
        "intermediate": dict(signed.steps),
    }


__all__ = ["BadFields", "BadVector", "CannotSign", "sign_vector"]
