"""`upstreams.NAME.sign` as data: one class for each scheme, made of its credentials and options."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    create_model,
    field_validator,
    model_validator,
)

from filters.signers import SCHEMES, find
from filters.signers.scheme import Credentials, Scheme
from sidecar.api import FilterConfig, Secret, literal

SET_ASIDE_S = 600.0

NICKNAMES = {"sigv4": "AWS4-HMAC-SHA256"}
"""What others call a scheme and is no part of its name."""


def _is_no_nickname(name: Any) -> Any:
    for nickname, meant in NICKNAMES.items():
        if isinstance(name, str) and nickname in name.lower():
            raise ValueError(f'is called "{meant}" here')
    return name


if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Annotated[Literal[tuple(SCHEMES)], BeforeValidator(_is_no_nickname)]


class SignSettings(FilterConfig):
    """How to authenticate at one upstream.

    Its secrets stand beside `scheme`, or, several of them, as a list in `pool`.
    """

    model_config = ConfigDict(extra="allow")  # until the scheme is known: its own bases forbid
    excludes: ClassVar[frozenset[str]] = frozenset({"pass_client_key"})

    scheme: SchemeName
    """How; it decides which other settings there are."""

    @classmethod
    def variant(cls, values: Any) -> type[Self]:
        name = values.get("scheme") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in SCHEMES:
            return cls
        return cast(type[Self], settings_of(name, "pool" in values))

    @model_validator(mode="before")
    @classmethod
    def _has_what_belongs_together(cls, values: Any) -> Any:
        if isinstance(values, dict) and "set_aside_s" in values and "pool" not in values:
            raise ValueError("`set_aside_s` goes with `pool` alone: remove it")
        return values

    @property
    def keys(self) -> Sequence[Credentials]:
        """The credentials, in order; each is also what the scheme's signer takes."""
        return (cast(Credentials, self),)

    def notes(self, base_url: str) -> Sequence[str]:
        notes = []
        if find(self.scheme).needs_body(self):
            notes.append(
                "signs the body: one that streams (an upload) is held first, up to "
                "http.max_body_bytes"
            )
        if _is_readable(base_url):
            notes.append("goes over plain http: whoever is on the way can read it")
        if _is_readable(getattr(self, "token_url", "")):
            notes.append(
                "fetches its token over plain http: whoever is on the way can read that, too"
            )
        return notes


class PoolSettings(SignSettings):
    """The same with several keys, which take turns."""

    pool: list[Any]
    """One entry a key: its secrets as a mapping, or the reference alone when there is but one."""
    set_aside_s: PositiveFloat = SET_ASIDE_S
    """A key that was answered 401 or 403 is tried again after so long."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_key_beside(cls, values: Any) -> Any:
        for name in find(values["scheme"]).Credentials.model_fields:
            if name in values:
                raise ValueError(f"`{name}` cannot stand beside `pool`: move it into the list")
        return values

    @field_validator("pool")
    @classmethod
    def _are_different(cls, pool: list[Any]) -> list[Any]:
        seen: dict[str, int] = {}
        for index, each in enumerate(pool):
            if (first := seen.setdefault(digest(each), index)) != index:
                raise ValueError(f"entries {first + 1} and {index + 1} are the same key")
        return pool

    @property
    def keys(self) -> Sequence[Credentials]:
        return tuple(self.pool)


def _is_readable(url: str) -> bool:
    """Whether others than this machine may see what is sent there."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname in (None, "localhost"):
        return False
    address = literal(parts.hostname)
    return address is None or not ip_address(address).is_loopback


@cache
def settings_of(name: str, has_pool: bool) -> type[SignSettings]:
    """The settings of one scheme, with its secrets in place or in a pool."""
    scheme = find(name)
    fields: dict[str, Any] = {"scheme": (Literal[name], ...)}
    bases: Any = (SignSettings, scheme.Credentials, scheme.Options)
    if has_pool:
        entry: Any = Annotated[(scheme.Credentials, BeforeValidator(_shorthand(scheme)))]
        fields["pool"] = (list[entry], Field(min_length=1))
        bases = (PoolSettings, scheme.Options)
    return cast(type[SignSettings], create_model("SignSettings", __base__=bases, **fields))


def _shorthand(scheme: Scheme) -> Any:
    """`env:KEY` is short for `{key: env:KEY}` where the credentials are one secret."""
    names = list(scheme.Credentials.model_fields)

    def whole(value: Any) -> Any:
        return {names[0]: value} if isinstance(value, str) and len(names) == 1 else value

    return whole


def digest(credentials: Credentials) -> str:
    """Hex SHA-256 over the secrets of `credentials`, to tell keys apart without holding them."""
    total = hashlib.sha256()
    for name in type(credentials).model_fields:
        value = getattr(credentials, name)
        if isinstance(value, Secret):
            total.update(f"{name}={value.sha256()}\n".encode())
    return total.hexdigest()


def reference(credentials: Credentials) -> str:
    """Where the first secret of `credentials` comes from, such as `env:KEY`: to name the key."""
    for name in type(credentials).model_fields:
        value = getattr(credentials, name)
        if isinstance(value, Secret):
            return value.reference
    return ""
