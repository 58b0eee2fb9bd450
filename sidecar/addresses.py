"""Addresses that no upstream may have unless the configuration allows them: link-local ones, and
those at which clouds hand an instance its credentials.

Whoever can change a DNS answer could otherwise have a call and its key sent there, or read what is
there. Loopback and private networks stay open: models run on this machine and in this cluster.
Multicast, broadcast and the unspecified address stay open too: TCP reaches nobody by the first
two, and by the third nobody but this machine.

Pure: no look-ups here. An IPv4 address may hide in an IPv6 one; all forms with a well-known prefix
are seen through. A translator (NAT64) with a prefix of the network's own cannot be known.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohappyeyeballs import AddrInfoType

Network = IPv4Network | IPv6Network

REFUSED: tuple[Network, ...] = tuple(
    ip_network(each)
    for each in (
        "169.254.0.0/16",  # link-local, RFC 3927: nearly every cloud's metadata, 169.254.169.254
        "fe80::/10",  # link-local, RFC 4291 2.5.6; OpenStack's and Akamai's fe80::a9fe:a9fe
        "fd00:ec2::/32",  # AWS: instance metadata ::254, EKS pod identity ::23 (EC2 and EKS guides)
        "fd20:ce::254/128",  # Google Cloud, instances with IPv6 alone (Compute Engine, metadata)
        "168.63.129.16/32",  # Azure: the host's wire server ("What is IP address 168.63.129.16")
        "100.100.100.200/32",  # Alibaba Cloud (ECS, instance metadata)
        "fd00:100::100:200/128",  # the same by IPv6 (ECS; cloud-init's data source)
        "100.96.0.96/32",  # Volcengine (ECS, instance metadata)
        "fd00:c1::a9fe:a9fe/128",  # Oracle Cloud by IPv6 (Compute, instance metadata; its SDK)
        "192.0.0.192/32",  # Oracle Cloud Classic
        "fd00:42::42/128",  # Scaleway by IPv6 (cloud-init's data source)
        "fd00:a9fe:a9fe::1/128",  # Akamai (Linode) by IPv6 (metadata service API)
    )
)

_LAST = (12, 13, 14, 15)

_EMBEDDING: tuple[tuple[IPv6Network, tuple[tuple[int, ...], ...]], ...] = (
    (IPv6Network("::/96"), (_LAST,)),  # IPv4-compatible, RFC 4291 2.5.5.1
    (IPv6Network("::ffff:0:0/96"), (_LAST,)),  # IPv4-mapped, RFC 4291 2.5.5.2
    (IPv6Network("::ffff:0:0:0/96"), (_LAST,)),  # IPv4-translated, RFC 2765 2.1
    (IPv6Network("64:ff9b::/96"), (_LAST,)),  # NAT64, RFC 6052 2.1
    # NAT64 of a network's own, RFC 8215. Its prefix is /48, /56, /64 or /96 (RFC 6052 2.2) and
    # nothing tells which: all four readings count.
    (
        IPv6Network("64:ff9b:1::/48"),
        ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), _LAST),
    ),
    (IPv6Network("2002::/16"), ((2, 3, 4, 5),)),  # 6to4, RFC 3056 2
)
"""Networks whose addresses hold an IPv4 one, and in which of their 16 bytes."""

_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")
"""What stands before the IPv4 address in an interface identifier, below any prefix: RFC 5214 6.1"""


def is_forbidden(address: str, allowed: Iterable[Network] = ()) -> bool:
    """Whether nobody may connect to `address`, an IPv4 or IPv6 one, with or without a zone.

    A network in `allowed` permits its addresses, and those in which one of them hides. Raises
    ValueError for what is no address.
    """
    whole = ip_address(address)
    networks = tuple(allowed)
    if _is_in(whole, networks):
        return False
    return any(_is_in(each, REFUSED) and not _is_in(each, networks) for each in _readings(whole))


def permitted(infos: Iterable[AddrInfoType], allowed: Sequence[Network]) -> list[AddrInfoType]:
    """Those results of `getaddrinfo` that may be connected to, in their order.

    Connect to what this returns, without another look-up: its answer could be another one.
    """
    return [info for info in infos if not is_forbidden(str(info[4][0]), allowed)]


def literal(host: str) -> str | None:
    """The address that `host` spells without any name server; None for a name.

    Knows the spellings of `inet_aton` too, which resolvers accept: `0xa9fea9fe`, `2852039166`,
    `0251.0376.0251.0376` and `169.254.43518` are all 169.254.169.254.
    """
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host.removesuffix(".")))
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None


def _is_in(address: IPv4Address | IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _readings(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address | IPv6Address]:
    """`address`, and the IPv4 addresses to which a translator or tunnel may take it."""
    yield address
    if isinstance(address, IPv4Address):
        return
    data = address.packed
    for network, places in _EMBEDDING:
        if address in network:
            for place in places:
                yield IPv4Address(bytes(data[index] for index in place))
    if data[8:12] in _ISATAP:
        yield IPv4Address(data[12:])
    if address.teredo is not None:  # RFC 4380 4: its server and, inverted, its client
        yield from address.teredo
