"""All errors that cross a module border, as one tree.

    SidecarError
    ├── ConfigError              a configuration that does not load; carries every problem found
    ├── FetchFailed              a fetch of our own, such as a token's, that brought nothing
    └── CallError                a call that gets no (whole) answer; knows its HTTP status and code
        ├── Rejected             refused by us: bad key, unknown model, a limit, a full queue
        └── UpstreamError        refused or lost by the far side; says where, and whether to retry

A client that leaves is no error of this tree: its task is cancelled (`asyncio.CancelledError`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class SidecarError(Exception):
    """Base of everything raised on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration: where it is, what it is and how to mend it.

    `line` and `column` count from 1; 0 when the place is the file as a whole.
    `path` is the dotted place inside the file, such as `upstreams.openai.base_url`.
    """

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigError(SidecarError):
    """A configuration that does not load. `problems` holds every mistake found, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class Phase(Enum):
    """How far an attempt had come when it failed."""

    ADMIT = "admit"  # a circuit or a limit of ours held it back; nothing was sent
    SIGN = "sign"  # no credentials to send; nothing was sent
    RESOLVE = "resolve"  # looking up the upstream's name
    POOL = "pool"  # waiting for a free connection
    CONNECT = "connect"  # TCP or unix connect, and the proxy's CONNECT
    TLS = "tls"  # handshake and certificate
    SEND = "send"  # request written, or being written; no byte of an answer yet
    HEAD = "head"  # part of the head was here
    FIRST_EVENT = "first_event"  # a 200 whose first event was an error
    BODY = "body"  # the answer had begun

    @property
    def is_ours(self) -> bool:
        """Whether the upstream was not even asked: it is not to blame."""
        return self in _OURS


_OURS = frozenset({Phase.ADMIT, Phase.SIGN, Phase.POOL})


class Retry(Enum):
    """Whether another attempt makes sense; set by the code that knows."""

    NO = "no"
    SAME = "same"  # the same upstream may answer
    ELSEWHERE = "elsewhere"  # only another upstream may answer


class FetchFailed(SidecarError):
    """Something outside of a call could not be fetched, such as a token; says why, never where."""


class CallError(SidecarError):
    """A call that gets no whole answer.

    `status` is the HTTP status for the client, `code` a stable word for programs, the message a
    sentence for people. None of them ever holds a secret, an upstream's address or a traceback.
    """

    status: int
    code: str

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.headers = dict(headers) if headers else {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} {self.code}: {self.message}>"


def forget_frames(error: BaseException | None) -> None:
    """Let go of the frames that `error` came through, for whoever swallows it: they hold the
    attempt, whose end holds the error."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class Rejected(CallError):
    """We refuse the call. Filters raise it; the edge answers in the client's dialect."""


class UpstreamError(CallError):
    """The upstream gave no answer, or not all of it.

    `provider_code` is the provider's own word, when it answered 200 and then an error.
    """

    def __init__(
        self,
        phase: Phase,
        retry: Retry,
        code: str,
        message: str,
        *,
        status: int = 502,
        retry_after_s: float | None = None,
        provider_code: str = "",
    ) -> None:
        super().__init__(status, code, message, retry_after_s=retry_after_s)
        self.phase = phase
        self.retry = retry
        self.provider_code = provider_code

    def __repr__(self) -> str:
        return f"<UpstreamError {self.phase.value} {self.code} retry={self.retry.value}>"
