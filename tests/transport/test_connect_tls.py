"""TLS towards an upstream: verified unless told otherwise in so many words."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from sidecar.clock import SystemClock
from sidecar.config import bind, load_config
from sidecar.config.schema import TlsSettings
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.metrics import Metrics
from sidecar.resources import Resources
from sidecar.snapshot import Shared, Snapshot
from sidecar.tasks import Tasks
from sidecar.transport.upstream import LiveUpstream, tls_context
from tests.support.attempts import OpenUpstream, attached, make_attempt, until, whole
from tests.support.upstream import RawConnection, RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[RawUpstream]:
    async with RawUpstream(tls=server_context(authority, "127.0.0.1", "good.test")) as secure:
        yield secure


async def exchange(upstream: LiveUpstream, raw: RawUpstream) -> RawConnection:
    """One call that goes well."""
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(OK)
    assert await whole(await task) == b"ok"
    return connection


async def refused(upstream: LiveUpstream, raw: RawUpstream) -> UpstreamError:
    """One call whose handshake fails; both ends' view is awaited, ours is returned."""
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await raw.accept()
    with pytest.raises(UpstreamError) as caught:
        await task
    return caught.value


async def test_unknown_authority_is_refused(
    secure: RawUpstream, open_upstream: OpenUpstream
) -> None:
    error = await refused(open_upstream(secure.base_url, proxy="none"), secure)
    assert (error.phase, error.retry, error.status) == (Phase.TLS, Retry.ELSEWHERE, 502)
    assert error.code == "upstream_tls_failed"


async def test_certificate_of_another_name_is_refused(
    authority: trustme.CA, ca_file: str, open_upstream: OpenUpstream
) -> None:
    async with RawUpstream(tls=server_context(authority, "other.test")) as other:
        upstream = open_upstream(other.base_url, proxy="none", tls={"ca_file": ca_file})
        assert (await refused(upstream, other)).phase is Phase.TLS


async def test_known_authority_is_trusted_and_alpn_says_http_1_1(
    secure: RawUpstream, ca_file: str, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(secure.base_url, proxy="none", tls={"ca_file": ca_file})
    connection = await exchange(upstream, secure)
    assert connection.tls is not None
    assert connection.tls.selected_alpn_protocol() == "http/1.1"
    assert connection.tls.version() in ("TLSv1.2", "TLSv1.3")


async def test_server_name_is_verified_instead_of_the_host(
    authority: trustme.CA, ca_file: str, open_upstream: OpenUpstream
) -> None:
    context = server_context(authority, "good.test")
    asked: list[str | None] = []
    context.sni_callback = lambda sock, name, context: asked.append(name)
    async with RawUpstream(tls=context) as named:
        tls = {"ca_file": ca_file, "server_name": "good.test"}
        await exchange(open_upstream(named.base_url, proxy="none", tls=tls), named)
        tls["server_name"] = "bad.test"
        error = await refused(open_upstream(named.base_url, proxy="none", tls=tls), named)
        assert error.phase is Phase.TLS
    assert asked == ["good.test", "bad.test"]


async def test_client_certificate_is_shown(
    authority: trustme.CA, ca_file: str, tmp_path: Path, open_upstream: OpenUpstream
) -> None:
    context = server_context(authority, "127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    issued = authority.issue_cert("client.test")
    whole_pem, cert, key = tmp_path / "all.pem", tmp_path / "c.pem", tmp_path / "k.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(str(whole_pem))
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    async with RawUpstream(tls=context) as mutual:
        for files in (
            {"cert_file": str(cert), "key_file": str(key)},
            {"cert_file": str(whole_pem)},
        ):
            tls = {"ca_file": ca_file, **files}
            upstream = open_upstream(mutual.base_url, proxy="none", tls=tls)
            connection = await exchange(upstream, mutual)
            assert connection.tls is not None
            shown: Any = connection.tls.getpeercert()
            assert ("DNS", "client.test") in shown["subjectAltName"]


async def test_missing_client_certificate_fails_the_call(
    authority: trustme.CA, ca_file: str, open_upstream: OpenUpstream
) -> None:
    context = server_context(authority, "127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    async with RawUpstream(tls=context) as mutual:
        upstream = open_upstream(mutual.base_url, proxy="none", tls={"ca_file": ca_file})
        await refused(upstream, mutual)


async def test_nothing_is_verified_when_the_settings_say_so(
    authority: trustme.CA, open_upstream: OpenUpstream
) -> None:
    async with RawUpstream(tls=server_context(authority, "other.test")) as other:
        tls = {"insecure_skip_verify": True}
        await exchange(open_upstream(other.base_url, proxy="none", tls=tls), other)


async def test_file_that_is_no_certificate_is_refused_when_the_context_is_made(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    with pytest.raises(ssl.SSLError):
        tls_context(TlsSettings(ca_file=str(path)))


async def test_large_body_arrives_byte_for_byte_with_pauses(
    secure: RawUpstream, ca_file: str, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(secure.base_url, proxy="none", tls={"ca_file": ca_file})
    data = bytes(range(256)) * 16 * 1024  # 4 MiB
    task = asyncio.create_task(upstream.send(make_attempt(upstream, body=data)))
    connection = await secure.accept()
    assert (await connection.read_request()).endswith(b"\r\n\r\n" + data)
    connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    reply = await task
    sink = attached(reply.body)
    for share in (1, 2, 3):
        await sink.until(lambda share=share: len(sink.data) > len(data) * share // 4)
        reply.body.pause()
        taken = len(sink.data)
        await asyncio.sleep(0)
        assert len(sink.data) == taken
        reply.body.resume()
    await sink.over()
    assert sink.data == data


async def test_kept_tls_connection_serves_the_next_call(
    secure: RawUpstream, ca_file: str, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(secure.base_url, proxy="none", tls={"ca_file": ca_file})
    connection = await exchange(upstream, secure)
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    await connection.read_request()
    connection.write(OK)
    assert await whole(await task) == b"ok"
    connection.close()
    await until(lambda: "open=0" in repr(upstream.pool))


async def test_tls_body_that_breaks_off_has_failed(
    secure: RawUpstream, ca_file: str, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(secure.base_url, proxy="none", tls={"ca_file": ca_file})
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await secure.accept()
    await connection.read_request()
    connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst")
    sink = attached((await task).body)
    connection.shut_down()
    await sink.over()
    assert isinstance(sink.error, UpstreamError)
    assert sink.error.phase is Phase.BODY


async def test_given_up_tls_call_closes_its_connection_at_once(
    secure: RawUpstream, ca_file: str, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(secure.base_url, proxy="none", tls={"ca_file": ca_file})
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await secure.accept()
    await connection.read_request()
    loop = asyncio.get_running_loop()
    at = loop.time()
    task.cancel()
    await connection.closed()
    assert loop.time() - at < 0.05
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("is_verified", [True, False])
async def test_start_warns_of_an_upstream_that_is_not_verified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_verified: bool
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "upstreams:\n"
        "  far:\n"
        "    dialect: openai\n"
        "    base_url: https://127.0.0.1:9\n"
        f"    tls: {{insecure_skip_verify: {str(not is_verified).lower()}}}\n"
        "models: {m: [far]}\n"
    )
    shared = Shared(
        resources=Resources(),
        metrics=Metrics(),
        tasks=Tasks(),
        clock=SystemClock(),
        access_log=lambda fields: None,
    )
    snapshot = Snapshot(bind(load_config(path, {})), shared, generation=1)
    await snapshot.start()
    try:
        warned = [
            record.__dict__["upstream"]
            for record in caplog.records
            if record.message == "tls_not_verified" and record.levelname == "WARNING"
        ]
        assert warned == ([] if is_verified else ["far"])
    finally:
        await snapshot.stop()
