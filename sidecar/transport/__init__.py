"""The upstream side: a thin HTTP/1.1 client on asyncio protocols, parsed by llhttp.

It pushes: bytes reach `Body.feed` in the turn of the loop that read them. Why not a client library:
docs/adr/0002-own-upstream-client.md.
"""
