"""HTTP Basic (RFC 7617): self-hosted servers behind a web server's password."""

from __future__ import annotations

import base64

from pydantic import field_validator

from filters.signers.scheme import Credentials as BaseCredentials
from filters.signers.scheme import Options as BaseOptions
from filters.signers.scheme import Request, Scheme, Signed
from sidecar.api import Secret


class Credentials(BaseCredentials):
    """The password."""

    password: Secret


class Options(BaseOptions):
    """The user's name; RFC 7617, 2: it holds no colon."""

    username: str

    @field_validator("username")
    @classmethod
    def _has_no_colon(cls, username: str) -> str:
        if ":" in username or not username.isprintable():
            raise ValueError("write the name itself: it holds no colon and no control character")
        return username


def sign(
    request: Request, credentials: Credentials, options: Options, now: float, nonce: str
) -> Signed:
    pair = f"{options.username}:{credentials.password.reveal()}".encode()
    value = f"Basic {base64.b64encode(pair).decode()}"
    return Signed({"Authorization": value})


SCHEME = Scheme(is_fixed=True, sign=sign, Credentials=Credentials, Options=Options)
