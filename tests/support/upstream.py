"""A raw upstream: the test reads a request's very bytes and writes an answer's very bytes.

It knows nothing of HTTP but where a request ends. What the test does not accept or read stays in
the kernel, so a hanging, slow or dying upstream is written by leaving steps out.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Self

WITHIN_S = 5.0
"""A test that waits longer for a peer has failed."""


class RawUpstream:
    """A listener on a free port of 127.0.0.1, or on a unix socket; closes all it accepted."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        unix_path: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        backlog: int = 100,
    ) -> None:
        self._tls = tls
        self._accepted: list[RawConnection] = []
        if unix_path is not None:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(unix_path))
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.socket(family, socket.SOCK_STREAM)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
        self._listener.listen(backlog)
        self._listener.setblocking(False)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def base_url(self) -> str:
        return f"{'https' if self._tls is not None else 'http'}://127.0.0.1:{self.port}"

    @property
    def accepted(self) -> int:
        """How many connections the test took so far."""
        return len(self._accepted)

    def has_waiting(self) -> bool:
        """Whether somebody connected whom the test has not accepted yet."""
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        sock.close()
        return True

    async def accept_socket(self) -> socket.socket:
        """The next connection before TLS, as a socket that the caller closes."""
        loop = asyncio.get_running_loop()
        sock, _ = await asyncio.wait_for(loop.sock_accept(self._listener), WITHIN_S)
        return sock

    async def accept(self, *, receive_bytes: int | None = None) -> RawConnection:
        """The next connection, after TLS. `receive_bytes` sets the kernel's receive buffer."""
        sock = await self.accept_socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection = RawConnection(sock)
        self._accepted.append(connection)
        await connection.start(self._tls)
        return connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._listener.close()
        for connection in self._accepted:
            connection.abort()


class RawConnection:
    """The upstream's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = asyncio.StreamReader(limit=64 * 1024)
        self._transport: asyncio.Transport | None = None

    async def start(self, tls: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        protocol = _Reading(self._reader)
        try:
            self._transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, self.sock, ssl=tls
            )
        except BaseException:
            self.sock.close()
            raise

    @property
    def tls(self) -> ssl.SSLObject | None:
        assert self._transport is not None
        found: ssl.SSLObject | None = self._transport.get_extra_info("ssl_object")
        return found

    # Reading

    async def read_head(self) -> bytes:
        """A request's head with its empty line."""
        return await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), WITHIN_S)

    async def read_exactly(self, count: int) -> bytes:
        return await asyncio.wait_for(self._reader.readexactly(count), WITHIN_S)

    async def read_until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self._reader.readuntil(end), WITHIN_S)

    async def read_request(self) -> bytes:
        """A whole request, byte for byte."""
        head = await self.read_head()
        lower = head.lower()
        if b"\r\ntransfer-encoding: chunked\r\n" in lower:
            return head + await self._read_chunks()
        _, found, after = lower.partition(b"\r\ncontent-length: ")
        if not found:
            return head
        return head + await self.read_exactly(int(after.partition(b"\r\n")[0]))

    async def _read_chunks(self) -> bytes:
        whole = b""
        while True:
            size = await self.read_until(b"\r\n")
            whole += size + await self.read_exactly(int(size, 16) + 2)
            if size == b"0\r\n":
                return whole

    async def closed(self) -> float:
        """Wait until the other side has closed or reset; the time of `time.monotonic`."""
        try:
            while await asyncio.wait_for(self._reader.read(64 * 1024), WITHIN_S):
                pass
        except ConnectionError:
            pass
        return time.monotonic()

    # Answering

    def write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    @property
    def unsent_bytes(self) -> int:
        """Written by the test, but not taken by the kernel: the far side does not read."""
        assert self._transport is not None
        return self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Close once everything is written."""
        assert self._transport is not None
        self._transport.close()

    def shut_down(self) -> None:
        """Close in the kernel, now, before any loop has a turn."""
        self.sock.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Close with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Reading(asyncio.StreamReaderProtocol):
    """Tells the reader of a reset too, and keeps the transport open after an EOF."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)

    def eof_received(self) -> bool:
        super().eof_received()
        return False
