"""Judgements on single values that more than a type decides: addresses, headers, name patterns.

Pure and without places; `check.py` knows where the value stands.
"""

from __future__ import annotations

import ipaddress
import re

from sidecar.headers import NEVER_SET

CREDENTIAL_HEADERS = frozenset(
    {"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "x-goog-api-key"}
)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address` (`host:port` or `unix:/path`)."""
    if address.startswith("unix:"):
        return True
    host = _host_and_port(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def collide(first: str, second: str) -> bool:
    """Whether the two addresses cannot both be listened on."""
    if first.startswith("unix:") or second.startswith("unix:"):
        return first == second
    (host, port), (other_host, other_port) = _host_and_port(first), _host_and_port(second)
    if port != other_port or port == 0:
        return False
    return host == other_host or not {host, other_host}.isdisjoint({"0.0.0.0", "::"})


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]").lower()
    return "127.0.0.1" if host == "localhost" else host, int(port)


def wrong_header(name: str, value: str) -> str:
    """What is wrong with a header for every request; empty when nothing is."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        return "no header can have this name"
    if name.lower() in NEVER_SET:
        return "this header is set for each request: remove it"
    if name.lower() in CREDENTIAL_HEADERS:
        return "credentials belong into the section `sign`: move it there"
    if not re.fullmatch(
        r"[\x21-\x7e\x80-\xff]([\x20-\x7e\x80-\xff\t]*[\x21-\x7e\x80-\xff])?", value
    ):
        return "no header can have this value: use visible Latin-1 characters"
    return ""


def may_meet(first: str, second: str) -> bool:
    """Whether some name matches both patterns (`*`: any characters, `?`: one)."""
    row = [True] + [False] * len(second)
    for column, pattern in enumerate(second, 1):
        row[column] = row[column - 1] and pattern == "*"
    for a in first:
        above, row = row, [row[0] and a == "*"]
        for column, b in enumerate(second, 1):
            if a == "*" or b == "*":
                row.append(above[column] or row[column - 1])
            else:
                row.append(above[column - 1] and (a == b or "?" in (a, b)))
    return row[-1]
