"""Where no call may go: by number, and in disguise."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.addresses import is_forbidden, literal, permitted
from tests.support.addresses import DISGUISES, METADATA, ODD_SPELLINGS

# By number


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.0.0", METADATA, "169.254.255.255", "169.254.170.2", "169.254.0.23"),
        *("fe80::", "fe80::a9fe:a9fe", "febf::1", "fe80::1%eth0", "fe80::1%1"),
        *("fd00:ec2::254", "fd00:ec2::23", "FD00:0EC2:0:0::254", "fd20:ce::254"),
        *("100.100.100.200", "fd00:100::100:200", "100.96.0.96", "168.63.129.16"),
        *("192.0.0.192", "fd00:c1::a9fe:a9fe", "fd00:42::42", "fd00:a9fe:a9fe::1"),
        *DISGUISES,
    ],
)
def test_link_local_and_metadata_addresses_are_forbidden(address: str) -> None:
    assert is_forbidden(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "::1", "0.0.0.0", "::"),
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12:3456::1", "fec0::1"),
        *("169.253.255.255", "169.255.0.0", "fec0::", "fe7f::1"),
        *("100.100.100.199", "168.63.129.17", "192.0.0.191", "fd20:ce::255", "fd00:ec3::254"),
        *("8.8.8.8", "2606:4700::1111", "::ffff:10.0.0.1", "::ffff:127.0.0.1"),
        *("64:ff9b::8.8.8.8", "64:ff9b:1::8.8.8.8", "2002:808:808::1", "2001:db8::5efe:8.8.8.8"),
        *("2001:0:a00:1:8000:1:f5ff:fffe", "2001:db8:169:254::169:254"),
    ],
)
def test_all_other_addresses_are_free(address: str) -> None:
    assert not is_forbidden(address)


@given(st.integers(0, 2**16 - 1), st.sampled_from(["::ffff:0:0", "64:ff9b::", "::"]))
def test_no_link_local_address_can_hide(low: int, prefix: str) -> None:
    address = IPv4Address(0xA9FE0000 + low)
    assert is_forbidden(str(address))
    assert is_forbidden(str(IPv6Address(int(IPv6Address(prefix)) + int(address))))
    assert is_forbidden(str(IPv6Address((0x2002 << 112) + (int(address) << 80) + 1)))


@pytest.mark.parametrize(
    ("address", "allowed", "expected"),
    [
        (METADATA, "169.254.169.254", False),
        (METADATA, "169.254.0.0/16", False),
        (METADATA, "169.254.169.0/25", True),
        (METADATA, "fe80::/10", True),
        ("::ffff:169.254.169.254", "169.254.169.254", False),
        ("64:ff9b::169.254.169.254", "169.254.0.0/16", False),
        ("64:ff9b::169.254.169.254", "64:ff9b::/96", False),
        (METADATA, "64:ff9b::/96", True),
        ("fe80::1%eth0", "fe80::/64", False),
        ("fd00:ec2::254", "fd00:ec2::23", True),
        ("8.8.8.8", "169.254.0.0/16", False),
    ],
)
def test_allowed_networks_permit_what_is_theirs_alone(
    address: str, allowed: str, expected: bool
) -> None:
    assert is_forbidden(address, [ip_network(allowed)]) is expected


def test_what_is_no_address_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a\.test"):
        is_forbidden("a.test")


def info(address: str, port: int) -> Any:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    where: Any = (address, port, 0, 0) if ":" in address else (address, port)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where)


def test_what_is_permitted_keeps_its_order() -> None:
    infos = [info(each, 443) for each in ("10.0.0.2", METADATA, "::1", "fe80::1", "10.0.0.1")]
    assert permitted(infos, ()) == [infos[0], infos[2], infos[4]]
    assert permitted(infos, (ip_network(METADATA),)) == [*infos[:3], infos[4]]


@pytest.mark.parametrize("host", [METADATA, f"{METADATA}.", *ODD_SPELLINGS])
def test_every_spelling_of_an_address_is_read(host: str) -> None:
    assert literal(host) == METADATA


@pytest.mark.parametrize(
    "host", ["a.test", "", ".", "169.254.169.254.test", "0xa9fea9fe.test", "4294967296", "a\0", "é"]
)
def test_a_name_is_no_address(host: str) -> None:
    assert literal(host) is None
