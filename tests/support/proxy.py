"""A small real HTTP proxy: CONNECT only, with or without TLS and a password."""

from __future__ import annotations

import asyncio
import ssl
from types import TracebackType
from typing import Self


class ConnectProxy:
    """Tunnels to wherever it is asked to, on a free port of 127.0.0.1.

    `authorization`: the value of Proxy-Authorization that it demands. `refuse_with`: the status
    with which it refuses every tunnel. `answer`: what it says instead of anything else.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        authorization: str | None = None,
        refuse_with: int | None = None,
        answer: bytes | None = None,
    ) -> None:
        self._tls = tls
        self._authorization = authorization
        self._refuse_with = refuse_with
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.heads: list[bytes] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls is not None else 'http'}://{self.address}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if self._answer is not None:
                writer.write(self._answer)
            elif self._refuse_with is not None:
                writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % self._refuse_with)
            elif not self._is_authorized(head):
                writer.write(b"HTTP/1.1 407 Who?\r\nproxy-authenticate: Basic\r\n\r\n")
            else:
                await self._tunnel(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _is_authorized(self, head: bytes) -> bool:
        if self._authorization is None:
            return True
        return f"\r\nproxy-authorization: {self._authorization}\r\n".encode() in head

    async def _tunnel(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\nvia: 1.1 tests\r\n\r\n")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, far_writer))
                group.create_task(_copy(far_reader, writer))
        finally:
            far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side ends; then the other is closed too."""
    try:
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()
