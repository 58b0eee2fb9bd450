"""The HTTP/1.1 bytes both ends of the bench speak: payloads, request builder, message reader.

Both ends are ours and known, so the reader is small: it finds the end of a head, then counts body
bytes by Content-Length or by chunk. It checks nothing that a real parser must; it is fast enough
that one core can play all clients and the upstream. Sockets are left to `load` and `upstream`.
"""

MODEL = b"bench-gpt"
CALL_BODY_BYTES = 1024
ANSWER_BYTES = 600
EVENT_BYTES = 160

_EVENT_PREFIX = (
    b'data: {"id":"c-1","object":"chat.completion.chunk","created":1,"model":"bench-gpt",'
    b'"choices":[{"index":0,"delta":{"content":"'
)
_EVENT_SUFFIX = b'"}}]}\n\n'
EVENT = (
    _EVENT_PREFIX + b"x" * (EVENT_BYTES - len(_EVENT_PREFIX) - len(_EVENT_SUFFIX)) + _EVENT_SUFFIX
)
LAST_EVENTS = (
    b'data: {"id":"c-1","object":"chat.completion.chunk","created":1,"model":"bench-gpt",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
)
USAGE_EVENT = (
    b'data: {"id":"c-1","object":"chat.completion.chunk","created":1,"model":"bench-gpt",'
    b'"choices":[],"usage":{"prompt_tokens":200,"completion_tokens":300,"total_tokens":500}}\n\n'
)
DONE_EVENT = b"data: [DONE]\n\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
END_OF_CHUNKS = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def json_answer(size_bytes: int) -> bytes:
    """A whole 200 reply, head and chat completion, whose body has exactly `size_bytes`."""
    prefix = (
        b'{"id":"chatcmpl-bench","object":"chat.completion","created":1,"model":"bench-gpt",'
        b'"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"'
    )
    suffix = (
        b'"}}],"usage":{"prompt_tokens":200,"completion_tokens":100,"total_tokens":300}}'  # ~300 B
    )
    body = prefix + b"x" * (size_bytes - len(prefix) - len(suffix)) + suffix
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % len(body)
        + body
    )


class RequestMaker:
    """Builds one kind of request; every body differs by a number, so that no cache can answer.

    Where a cache shall answer, `distinct` bodies come round again and again. `members` are further
    ones of the body's JSON object, each with its comma; `headers` are lines, each with its end.
    """

    def __init__(
        self,
        order: bytes,
        *,
        is_stream: bool,
        key: str = "x",
        body_bytes: int = CALL_BODY_BYTES,
        distinct: int | None = None,
        members: bytes = b"",
        headers: bytes = b"",
    ) -> None:
        self._start = b'{"model":"%b","stream":%b,%b"messages":[{"role":"user","content":"' % (
            MODEL,
            b"true" if is_stream else b"false",
            members,
        )
        self._end = b'"}],"max_tokens":512}'
        padding = body_bytes - len(self._start) - len(self._end) - 12
        self._start_padded = self._start + b"y" * padding
        self._head_start = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench.local\r\n"
            b"authorization: Bearer %b\r\ncontent-type: application/json\r\n"
            b"accept: application/json\r\nuser-agent: bench/1\r\ncontent-length: %d\r\n%b"
            b"x-bench: %b" % (key.encode(), body_bytes, headers, order)
        )
        self._fixed = self._head_start + b"\r\n\r\n" + self._start_padded
        self._distinct = distinct
        self._next = 0

    def make(self) -> bytes:
        """The next request."""
        self._next += 1
        if self._distinct is not None and self._next > self._distinct:
            self._next = 1
        return b"%b%012d%b" % (self._fixed, self._next, self._end)

    def make_numbered(self, number: int) -> bytes:
        """The next request, with `number` appended to its order (the id of a stream)."""
        self._next += 1
        return b"%b %d\r\n\r\n%b%012d%b" % (
            self._head_start,
            number,
            self._start_padded,
            self._next,
            self._end,
        )


class MessageReader:
    """Reads one HTTP message at a time; no pipelining, no 1xx, no trailers.

    `feed` says whether the message is complete; the next `feed` then starts a new one. `head` is in
    lower case and stays readable until then. `body_bytes` counts body bytes without chunk framing.
    """

    __slots__ = ("_announced", "_in_head", "_is_chunked", "_kept", "_left", "head")

    def __init__(self) -> None:
        self.head = b""
        self._kept = b""
        self._in_head = True
        self._is_chunked = False
        self._left = 0  # of the body, or of this chunk with its closing CRLF
        self._announced = 0

    @property
    def status(self) -> bytes:
        return self.head[9:12]

    @property
    def body_bytes(self) -> int:
        if self._is_chunked:
            return self._announced - max(0, self._left - 2)
        return self._announced - self._left

    def header(self, name: bytes) -> bytes:
        """The value of a header, lower case; empty if absent. `name` is given in lower case."""
        start = self.head.find(b"\r\n%b:" % name)
        if start < 0:
            return b""
        start += len(name) + 3
        return self.head[start : self.head.find(b"\r\n", start)].strip()

    def feed(self, data: bytes) -> bool:
        if self._in_head:
            if self._kept:
                data = self._kept + data
                self._kept = b""
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._kept = data
                return False
            self.head = data[: end + 2].lower()
            self._in_head = False
            length = self.header(b"content-length")
            self._is_chunked = not length and b"\r\ntransfer-encoding: chunked" in self.head
            self._left = self._announced = int(length or b"0")
            data = data[end + 4 :]
        if self._is_chunked:
            is_done = self._feed_chunked(data)
        else:
            self._left -= len(data)
            is_done = self._left <= 0
        self._in_head = is_done
        return is_done

    def _feed_chunked(self, data: bytes) -> bool:
        if self._kept:
            data = self._kept + data
            self._kept = b""
        position, size = 0, len(data)
        while True:
            if self._left:
                taken = min(self._left, size - position)
                self._left -= taken
                position += taken
                if self._left:
                    return False
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                self._kept = data[position:]
                return False
            length = int(data[position:line_end], 16)
            if length == 0:
                if size < line_end + 4:  # the empty line after the last chunk is still to come
                    self._kept = data[position:]
                    return False
                return True
            self._announced += length
            self._left = length + 2
            position = line_end + 2
