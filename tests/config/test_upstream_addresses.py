"""Hosts of upstreams that no call may go to, and those that are allowed by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sidecar.config import redacted

if TYPE_CHECKING:
    from conftest import Place


def config(base_url: str, more: str = "") -> str:
    return (
        f"upstreams:\n  a:\n    dialect: openai\n    base_url: '{base_url}'\n{more}"
        "chains: {default: {call: [], attempt: []}}\n"
    )


def allow(*networks: str) -> str:
    return f"    allow_addresses: {list(networks)}\n"


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("169.254.169.254", "169.254.169.254"),
        ("169.254.169.254.:8000", "169.254.169.254"),
        ("[fe80::1]:8000", "fe80::1"),
        ("[fe80::1%eth0]", "fe80::1%eth0"),
        ("[FD00:EC2::254]", "fd00:ec2::254"),
        ("[::ffff:169.254.169.254]", "::ffff:a9fe:a9fe"),
        ("100.100.100.200", "100.100.100.200"),
        ("2852039166", "169.254.169.254"),
        ("0xa9fea9fe", "169.254.169.254"),
        ("0251.0376.0251.0376", "169.254.169.254"),
        ("169.254.43518", "169.254.169.254"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_forbidden_address_is_refused_where_it_stands(
    place: Place, scheme: str, host: str, shown: str
) -> None:
    assert place.problems(config(f"{scheme}://{host}/v1")) == [
        f"config.yaml:4:15: upstreams.a.base_url: {shown} is link-local or a cloud's metadata "
        "service, and no call may go there: choose another, or list it in `allow_addresses`"
    ]


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:8000", "http://[::1]:8000", "http://0.0.0.0:8000", "http://10.0.0.1"),
        *("http://192.168.1.5", "http://[fd12::1]", "https://8.8.8.8", "http://localhost:1"),
        *("http://169.254.169.254.test", "mock:", "unix:/169.254.169.254/s.sock:/v1"),
    ],
)
def test_other_hosts_are_free(place: Place, url: str) -> None:
    assert place.problems(config(url)) == []


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("169.254.1.5", "169.254.1.5"),
        ("169.254.1.5", "169.254.1.0/24"),
        ("[::ffff:169.254.1.5]", "169.254.1.5"),
        ("[fe80::1%eth0]", "fe80::/64"),
        ("0xa9fe0105", "169.254.1.5"),
    ],
)
def test_an_address_may_be_allowed_by_name(place: Place, host: str, allowed: str) -> None:
    bound = place.bind(config(f"http://{host}", allow("100.100.100.200", allowed)))
    shown = redacted(bound.config, bound.teams)["config"]
    assert shown["upstreams"]["a"]["allow_addresses"] == ["100.100.100.200", allowed]


def test_what_is_allowed_for_one_upstream_is_not_for_another(place: Place) -> None:
    text = config("http://169.254.1.5", allow("169.254.1.5")).replace(
        "chains:", "  b: {dialect: openai, base_url: 'http://169.254.1.5'}\nchains:"
    )
    (problem,) = place.problems(text)
    assert problem.startswith("config.yaml:6:34: upstreams.b.base_url: 169.254.1.5 is link-local")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("169.254.1.5/16", 'has bits set after its prefix: write "169.254.0.0/16"'),
        ("fe80::1/64", 'has bits set after its prefix: write "fe80::/64"'),
        ("metadata.test", "write an address or a network, such as"),
        ("169.254.1.5/33", "write an address or a network, such as"),
        ("169.254.1.256", "write an address or a network, such as"),
        ("fe80::1%eth0", "write an address or a network, such as"),
        ("*", "write an address or a network, such as"),
        ("", "write an address or a network, such as"),
    ],
)
def test_what_is_no_network_is_refused(place: Place, value: str, message: str) -> None:
    (problem,) = place.problems(config("http://127.0.0.1", allow("::1", value)))
    assert problem.startswith("config.yaml:5:30: upstreams.a.allow_addresses[1]: ")
    assert message in problem


@pytest.mark.parametrize("url", ["http://[::1", "http://[zz]/", "http://h:99999", "http://h:x/"])
def test_a_host_or_port_that_cannot_be_is_refused(place: Place, url: str) -> None:
    assert place.problems(config(url)) == [
        "config.yaml:4:15: upstreams.a.base_url: there can be no such host or port: correct it"
    ]


@pytest.mark.parametrize("host", ["bücher.test", "１６９.254.169.254", "169。254。169。254"])
def test_a_host_that_is_not_ascii_is_refused(place: Place, host: str) -> None:
    """Digits of other scripts would be read as an address by the resolver."""
    assert place.problems(config(f"http://{host}")) == [
        "config.yaml:4:15: upstreams.a.base_url: write the host in ASCII, an "
        'international name as "xn--…"'
    ]
