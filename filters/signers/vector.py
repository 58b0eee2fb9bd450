"""One request as JSON, signed: what `sidecar sign` does, and how published vectors are tested.

{"scheme": "TC3-HMAC-SHA256",
 "credentials": {"secret_id": "env:ID", "secret_key": "file:key"},
 "clock": {"iso": "2024-07-01T08:00:00Z"}, "nonce": null,
 "options": {"service": "hunyuan", "action": "ChatCompletions", "version": "2023-09-01"},
 "request": {"method": "POST", "url": "https://hunyuan.tencentcloudapi.com/",
             "headers": [["Content-Type", "application/json"]], "body": "{}"}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from filters.signers import SCHEMES, find
from filters.signers.scheme import CannotSign, Request
from sidecar.api import FilterConfig, Secret

COMMENTS = frozenset({"note", "compare"})
"""Keys that vectors have for people."""

M = TypeVar("M", bound=FilterConfig)


class BadVector(ValueError):
    """The JSON does not say what to sign; the message names the place and the fix."""


def sign_vector(
    vector: Any, *, now: float, nonce: str, secret: Callable[[str], str] = lambda text: text
) -> dict[str, Any]:
    """Sign the request that `vector` describes.

    `now` (Unix seconds) and `nonce` are for a vector without `clock` or `nonce`; `secret` turns a
    credential as written into its value. The result is `{"headers": {name: value}, "url": str,
    "intermediate": {step: text}}`, where `headers` are those added, or set to another value than
    the request had. Raises `BadVector`, and `CannotSign` when the request lacks what the scheme
    signs.
    """
    if not isinstance(vector, dict):
        raise BadVector("expected a JSON object with scheme, credentials and request")
    name = _text(vector, "scheme", "")
    if name not in SCHEMES:
        close = get_close_matches(name, SCHEMES, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known are: {', '.join(SCHEMES)}"
        raise BadVector(f'scheme: there is no "{name}", {hint}')
    scheme = find(name)
    if scheme.exchange is not None:
        raise BadVector(
            f"scheme: {name} signs with a token that has to be fetched; nothing to show"
        )
    values = {
        key: Secret(secret(value)) if isinstance(value, str) else value
        for key, value in _mapping(vector, "credentials").items()
    }
    credentials = _read(scheme.Credentials, values, "credentials")
    options = _read(scheme.Options, _mapping(vector, "options"), "options")
    url, request, given = _request(_mapping(vector, "request"), scheme.own_headers)
    now = _time(vector.get("clock"), now)
    signed = scheme.sign(request, credentials, options, now, vector.get("nonce") or nonce)
    query = request.query if signed.query is None else signed.query
    return {
        "headers": {
            key: value for key, value in signed.headers.items() if given.get(key.lower()) != [value]
        },
        "url": f"{url}?{query}" if query else url,
        "intermediate": dict(signed.steps),
    }


def _read(model: type[M], values: Mapping[str, Any], where: str) -> M:
    given = {key: value for key, value in values.items() if key not in COMMENTS}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        lines = []
        for each in error.errors(include_url=False, include_input=False):
            key = ".".join([where, *map(str, each["loc"])])
            known = ", ".join(model.model_fields)
            if each["type"] == "missing":
                lines.append(f"{key}: is missing")
            elif each["type"] == "extra_forbidden":
                lines.append(f"{key}: unknown; known here: {known or 'nothing'}")
            else:
                lines.append(f"{key}: {each['msg']}")
        raise BadVector("\n".join(lines)) from None


def _request(
    values: Mapping[str, Any], own_headers: frozenset[str]
) -> tuple[str, Request, dict[str, list[str]]]:
    """The URL without its query, the request, and its headers as given, by lower-case name."""
    url = _text(values, "url", "request.")
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc or "@" in parts.netloc or "#" in url:
        raise BadVector("request.url: write scheme://host/path?query, as it goes on the wire")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise BadVector("request.url: percent-encode it, as it goes on the wire")
    given: dict[str, list[str]] = {}
    headers = []
    for pair in values.get("headers") or []:
        if not (isinstance(pair, list) and [type(each) for each in pair] == [str, str]):
            raise BadVector('request.headers: write a list of ["name", "value"] pairs')
        given.setdefault(pair[0].lower(), []).append(pair[1])
        if pair[0].lower() not in own_headers and pair[0].lower() != "host":
            headers.append((pair[0].lower(), pair[1]))
    body = "" if values.get("body") is None else values["body"]
    repeat = values.get("body_repeat", 1)
    if not isinstance(body, str) or not isinstance(repeat, int):
        raise BadVector("request.body: write it as text, and body_repeat as a number")
    path = parts.path or "/"
    request = Request(
        method=_text(values, "method", "request.").upper(),
        host=given.get("host", [parts.netloc])[0],
        path=path,
        query=parts.query,
        headers=tuple(headers),
        body=body.encode() * repeat,
    )
    return f"{parts.scheme}://{parts.netloc}{path}", request, given


def _time(clock: Any, now: float) -> float:
    """Unix seconds of `{"unix_ms": …}`, `{"unix": …}` or `{"iso": …}`; None: `now`."""
    if clock is None:
        return now
    if isinstance(clock, dict):
        if isinstance(clock.get("unix_ms"), int):
            return float(clock["unix_ms"]) / 1000
        if isinstance(clock.get("unix"), int | float):
            return float(clock["unix"])
        if isinstance(clock.get("iso"), str):
            try:
                found = datetime.fromisoformat(clock["iso"])
            except ValueError:
                found = None
            if found is not None:
                return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    raise BadVector('clock: write {"unix": seconds} or {"iso": "2024-07-01T08:00:00Z"}')


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    if not isinstance(found, dict):
        if found is None and key == "options":
            return {}
        raise BadVector(f"{key}: is missing, or no JSON object")
    return found


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    found = values.get(key)
    if not isinstance(found, str):
        raise BadVector(f"{where}{key}: is missing, or no text")
    return found


__all__ = ["BadVector", "CannotSign", "sign_vector"]
