"""What a signing scheme is: its settings, and pure functions from a request to what signs it.

A scheme's module knows nothing of calls, pools of keys or sockets; the filter `sign` and the
command `sidecar sign` bring the request, the credentials and the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote, unquote_plus, unquote_to_bytes

from pydantic import AfterValidator

from filters.stores.tokens import Token
from sidecar.api import FilterConfig, Secret, sendable_value

NO_STEPS: Mapping[str, str] = MappingProxyType({})


class CannotSign(Exception):
    """The request lacks what the scheme signs; the message says what, and never shows a secret."""


class Request(NamedTuple):
    """A request exactly as it goes on the wire, but for what signing adds."""

    method: str
    host: str
    """The `Host` header: name, and port unless it is the default."""
    path: str
    """Percent-encoded, at least `/`."""
    query: str
    """Percent-encoded, in the order of the wire, without `?`; empty when there is none."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in order, repeats kept; without `host` and the scheme's own headers."""
    body: bytes | None
    """None: it streams through unread, which only a scheme that needs no body ever sees."""
    url_scheme: str = "https"

    def header(self, name: str) -> str | None:
        """The values of `name` (lower case), trimmed and joined by `,`; None when there is none."""
        values = [value.strip(" \t") for each, value in self.headers if each == name]
        return ",".join(values) if values else None


class Signed(NamedTuple):
    """What signing adds to a request."""

    headers: dict[str, str]
    """To set, replacing what the request has of the same name; named as the provider writes it."""
    query: str | None = None
    """The whole new query; None: as it was."""
    steps: Mapping[str, str] = NO_STEPS
    """What was computed on the way (`canonical_request`, `string_to_sign` …), to compare with what
    the provider says it expected. Holds derived keys: for the command line alone."""
    good_until: float = 0.0
    """Until then (Unix seconds) the same headers sign any request; 0: this one alone. Of no meaning
    for a scheme that `is_fixed`."""

    def __repr__(self) -> str:
        return f"<Signed {', '.join(self.headers)}>"  # names only: values are secret


class Credentials(FilterConfig):
    """Base of a scheme's secrets: fields of type `Secret`, named as the provider names them."""


class Options(FilterConfig):
    """Base of what a scheme wants to know beside the secrets."""


class TokenRequest(NamedTuple):
    """The request that fetches a token. URL, headers and body may hold secrets."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes = b""

    def __repr__(self) -> str:
        return f"<TokenRequest {self.method}>"


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a scheme turns its credentials into a token."""

    request: Callable[[Any, Any, float], TokenRequest]
    """From credentials, options and the time (Unix seconds)."""
    read: Callable[[int, bytes, float], Token]
    """From the answer's status and body and the time it came (Unix seconds, and so are the token's
    times); raises `NoToken`."""
    refused: tuple[bytes, ...] = ()
    """Any of these in an answer, whatever its status, says that the token is not good any more."""
    expired: tuple[bytes, ...] = ()
    """Any of these in the answer to the token request says that the time signed with is off."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to authenticate a request."""

    sign: Callable[[Request, Any, Any, float, str], Signed]
    """Pure: from the request, the credentials (with an `exchange`: the `Token`), the options, the
    time (Unix seconds) and a nonce. Raises `CannotSign`."""
    Credentials: type[Credentials]
    Options: type[Options] = Options
    own_headers: frozenset[str] = frozenset({"authorization"})
    """Lower case; what a caller sends of them is taken off before signing."""
    needs_body: Callable[[Any], bool] = lambda options: False
    """Whether the body is part of what is signed, by the options: then it must be held."""
    expired: tuple[bytes, ...] = ()
    """Any of these in an answer from status 400 up says that the time signed with is off."""
    expired_within_200: tuple[bytes, ...] = ()
    """The same of an answer below 400. With the JSON around it: a model may say the bare word."""
    status_within_200: Callable[[bytes], int | None] | None = None
    """For providers whose errors are answers 200: the status that the beginning of a JSON answer
    stands for (401, 403, 429), or None."""
    exchange: Exchange | None = None
    is_fixed: bool = False
    """The same headers sign every request at any time, and nothing of it is looked at."""


def _sendable(secret: Secret) -> Secret:
    sendable_value(secret.reveal())
    return secret


SendableSecret = Annotated[Secret, AfterValidator(_sendable)]
"""A secret that goes into a header as it is."""


def chosen(option: str | None, name: str, header: str, request: Request) -> str:
    """What the option `name` says, or else the caller in `header`. Raises `CannotSign`."""
    found = option or request.header(header.lower())
    if not found:
        raise CannotSign(
            f"the {name} is not known: send it in the header {header}, "
            f"or set the option `{name}` of this upstream's signing"
        )
    return found


def basic_time(now: float) -> str:
    """ISO 8601, basic, in UTC: `20240701T080000Z`. Its first 8 characters are the date."""
    clock = time.gmtime(now)
    return (
        f"{clock.tm_year:04}{clock.tm_mon:02}{clock.tm_mday:02}"
        f"T{clock.tm_hour:02}{clock.tm_min:02}{clock.tm_sec:02}Z"
    )


def extended_time(now: float) -> str:
    """ISO 8601 in UTC: `2024-07-01T08:00:00Z`. Its first 10 characters are the date."""
    clock = time.gmtime(now)
    return (
        f"{clock.tm_year:04}-{clock.tm_mon:02}-{clock.tm_mday:02}"
        f"T{clock.tm_hour:02}:{clock.tm_min:02}:{clock.tm_sec:02}Z"
    )


def encode(text: str) -> str:
    """Percent-encode all but RFC 3986's unreserved characters, upper-case hex."""
    return quote(text, safe="", errors="surrogateescape")


def encode_path(path: str) -> str:
    """The same for a path that is encoded already, slashes kept: one spelling for each path."""
    return quote(unquote_to_bytes(path), safe="/")


def parameters(query: str) -> list[tuple[str, str]]:
    """Names and values of a query, decoded, in order; a name without `=` has an empty value.

    `+` is a space, as the forms that such queries come from write it.
    """
    if not query:
        return []
    pairs = [each.partition("=") for each in query.split("&") if each]
    return [(_decoded(name), _decoded(value)) for name, _, value in pairs]


def _decoded(text: str) -> str:
    return unquote_plus(text, errors="surrogateescape")


def encoded_parameters(query: str) -> list[tuple[str, str]]:
    """The same, each encoded by `encode`."""
    return [(encode(name), encode(value)) for name, value in parameters(query)]


def with_parameters(
    query: str, mine: Mapping[str, str], write: Callable[[str], str] = encode
) -> str:
    """`query` with these parameters in place of any of their names; the others keep their bytes.
    `write` encodes names and values."""
    others = [
        each for each in query.split("&") if each and _decoded(each.partition("=")[0]) not in mine
    ]
    return "&".join([*others, *[f"{write(name)}={write(value)}" for name, value in mine.items()]])
