"""What the mock provider has served, kept for whoever checks a proxy's own accounting.

Counts are of what was really sent, also when a stream was cut or its usage was wrong on purpose;
beside them stands what clients were told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

from sidecar.mock.content import Told

_MAX_KEPT_BYTES = 64 * 1024 * 1024
_MAX_MODELS = 1000
_OTHER_MODELS = "(other)"


@dataclass(slots=True, eq=False)
class Received:
    """One request as it came in, and what became of it. Times are those of the event loop."""

    method: str
    path: str
    query: str
    # As on the wire: case, order, repeats. Not in the repr, for it may hold credentials.
    raw_headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    arrived_at: float  # when the head was in
    # Only the first 4 MiB on a path that is merely echoed.
    body: bytes = field(default=b"", repr=False)
    body_bytes: int = 0  # received so far, or in all
    model: str = ""  # as the answer names it
    status: int | None = None  # of the head sent
    answer_began_at: float | None = None  # when bytes of a good answer's body went out
    events_sent: int = 0
    output_tokens_sent: int = 0
    told: Told | None = None  # the usage that the client was told, right or wrong
    is_answered: bool = False  # the whole answer was handed to the socket
    client_gone: bool = False  # left before that
    client_gone_at: float | None = None
    finished_at: float | None = None

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [
            (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
            for name, value in self.raw_headers
        ]

    def header(self, name: str) -> str | None:
        """The value of a header that came once or more: the first one."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    def header_values(self, name: str) -> list[str]:
        wanted = name.lower()
        return [value for key, value in self.headers if key.lower() == wanted]


@dataclass(slots=True)
class ModelBook:
    """The sums of one model: every call ends as completed, failed or aborted."""

    calls: int = 0
    completed_calls: int = 0  # the whole 2xx answer was sent
    failed_calls: int = 0  # an error status, or an error event inside a 200
    aborted_calls: int = 0  # cut before the end: the client left, or x-mock-die, or stop()
    aborted_streams: int = 0  # those of them that were streams
    input_tokens: int = 0  # of every call whose 2xx head was sent
    output_tokens: int = 0  # really sent
    told_input_tokens: int = 0  # as told to clients, the last time where it was told twice
    told_output_tokens: int = 0
    events: int = 0  # server-sent events wholly sent


@dataclass(slots=True)
class Books:
    """Sums per model, and the last requests (fewer than asked for while their bodies are large).

    A request is listed once its body is complete, or the client gave up sending it. Requests
    that name no model count under "".
    """

    max_requests: int = 1000
    models: dict[str, ModelBook] = field(default_factory=dict)
    requests: deque[Received] = field(default_factory=deque)
    _kept_bytes: int = 0

    def of(self, model: str) -> ModelBook:
        """The sums of a model, made when first asked for."""
        book = self.models.get(model)
        if book is None:
            if len(self.models) >= _MAX_MODELS:
                model = _OTHER_MODELS
            book = self.models.setdefault(model, ModelBook())
        return book

    @property
    def total(self) -> ModelBook:
        """The sums over all models, as they are now."""
        total = ModelBook()
        for name in (one.name for one in fields(ModelBook)):
            setattr(total, name, sum(getattr(book, name) for book in self.models.values()))
        return total

    def add(self, received: Received) -> None:
        """Lists a request, and forgets the oldest where they become too many or too large."""
        self.requests.append(received)
        self._kept_bytes += len(received.body)
        while len(self.requests) > self.max_requests or (
            self._kept_bytes > _MAX_KEPT_BYTES and len(self.requests) > 1
        ):
            self._kept_bytes -= len(self.requests.popleft().body)
