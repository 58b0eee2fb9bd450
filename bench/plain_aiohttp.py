"""A plain aiohttp proxy to compare with: web.Server in front, ClientSession behind, no filters.

Tuned as far as the two go: uvloop, no access log, no cookie jar, no decompression, unlimited
connections, small bodies in one piece. Usage: python -m bench.plain_aiohttp PORT UPSTREAM_PORT
"""

import asyncio
import gc
import sys

import aiohttp
import uvloop
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

HOP_BY_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding", "TE", "Trailer", "Upgrade")
SMALL_BODY_BYTES = 65536


def _without_hop_by_hop(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    copy = CIMultiDict(headers)
    for name in HOP_BY_HOP:
        copy.popall(name, None)
    return copy


async def serve(port: int, upstream_port: int) -> None:
    """Proxies 127.0.0.1:`port` to 127.0.0.1:`upstream_port` until the process is told to stop."""
    origin = f"http://127.0.0.1:{upstream_port}"
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(),
        auto_decompress=False,
    )

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        headers = _without_hop_by_hop(request.headers)
        headers.popall("Host", None)
        is_small = (request.content_length or 0) <= SMALL_BODY_BYTES
        data = await request.read() if is_small else request.content
        async with session.request(
            request.method, origin + request.raw_path, headers=headers, data=data
        ) as reply:
            near_headers = _without_hop_by_hop(reply.headers)
            length = reply.content_length
            if length is not None and length <= SMALL_BODY_BYTES:
                near_headers.popall("Content-Length", None)
                body = await reply.read()
                return web.Response(status=reply.status, headers=near_headers, body=body)
            near = web.StreamResponse(status=reply.status, headers=near_headers)
            await near.prepare(request)
            async for piece in reply.content.iter_any():
                await near.write(piece)
            await near.write_eof()
            return near

    server = web.Server(handle, access_log=None, handler_cancellation=True, keepalive_timeout=300)
    runner = web.ServerRunner(server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    gc.collect()
    gc.freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
