"""Embeddings of texts, asked of a model of this configuration beside the call that they are for.

The request takes the same way as the call's own: through what stands behind in the chain, and
through the filters of attempts. What to do with the vector is for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from filters.algo.estimate import tokens_of_text
from filters.algo.served import may_have_served
from sidecar.api import (
    LOST_USAGE,
    SIDE_CALLS,
    USAGE,
    Body,
    Call,
    CallError,
    CallNext,
    End,
    JsonEvent,
    Kit,
    Outcome,
    SideCall,
    Target,
    Usage,
    end_of,
)

if TYPE_CHECKING:
    from filters.algo.vectors import Vector

MAX_BYTES = 1024 * 1024
"""A longer answer is none: 3,072 numbers have 60 KB."""
PASSED_ON = frozenset(
    {
        *(b"authorization", b"x-api-key", b"api-key"),  # for upstreams that get the caller's
        *(b"openai-organization", b"openai-project"),
        *(b"traceparent", b"tracestate", b"baggage"),
    }
)
"""The caller's headers that are true of an embedding, too."""

LATE, FAILED = "late", "failed"


class Embedding(NamedTuple):
    vector: Vector
    """Of length 1."""
    by: str
    """Upstream and model that made it: with others' it cannot be compared."""


class Embedder:
    """Asks `model`, a public name whose targets are `targets`; `unit` makes a vector of numbers,
    or None. Raises ValueError when the targets have no `/v1/embeddings`."""

    def __init__(
        self,
        kit: Kit,
        model: str,
        targets: Sequence[Target],
        *,
        unit: Callable[[object], Vector | None],
        timeout_s: float,
    ) -> None:
        self._kit = kit
        self._model = model
        self._targets = tuple(targets)
        self._unit = unit
        self._timeout_s = timeout_s
        self._dialect = self._targets[0].upstream.dialect
        for target in self._targets:
            if target.upstream.dialect.name != "openai":
                raise ValueError(
                    f'"{model}" must be a model of the dialect openai: {target.upstream.name} '
                    f"speaks {target.upstream.dialect.name}"
                )
        (self._endpoint,) = (each for each in self._dialect.endpoints if each.name == "embeddings")
        self._is_failing = False

    async def ask(self, call: Call, call_next: CallNext, text: str) -> Embedding | str:
        """The embedding of `text`, or why there is none: `late` or `failed`. Never raises for it.

        What it took is among the call's `SIDE_CALLS` when this returns, or is cancelled.
        """
        fork = self._fork(call, text)
        # Of an earlier try of the call, which its own fork does not repeat.
        before = fork.get(USAGE), fork.get(LOST_USAGE)
        fork.on_end(partial(_account, call, fork, text, before))
        work = self._kit.tasks.start(self._run(fork, call_next), name="embedding")
        timer = self._kit.clock.call_later(self._timeout_s, work.cancel)
        try:
            await asyncio.wait((work,))
        finally:
            timer.cancel()
            if work.cancel():  # the client left: the call ends before the task hears of it
                fork.finish(End(call.cancelled_as or Outcome.DISCARDED, fork.status))
            call.upstream_wait_s += fork.upstream_wait_s
            call.held_s += fork.held_s
        if work.cancelled():
            self._trouble(LATE)
            return LATE
        found = FAILED if work.exception() is not None else work.result()
        if isinstance(found, Embedding) and self._is_failing:
            self._is_failing = False
            self._kit.log.info("embeddings_work", extra={"model": self._model})
        return found

    def _fork(self, call: Call, text: str) -> Call:
        fork = call.fork(
            call_id=f"{call.id}:embedding",
            path=self._endpoint.path,
            endpoint=self._endpoint,
            body=orjson.dumps({"model": self._model, "input": text}),
            model=self._model,
            targets=self._targets,
        )
        fork.dialect = self._dialect
        fork.label = self._model
        fork.query = ""
        fork.raw_headers = [
            (b"content-type", b"application/json"),
            *(field for field in call.raw_headers if field[0].lower() in PASSED_ON),
        ]
        return fork

    async def _run(self, fork: Call, call_next: CallNext) -> Embedding | str:
        try:
            reply = await call_next(fork)
            fork.status = reply.status
            data = await _whole(reply.body)
            found = None
            if data is not None and reply.status == 200:
                event = JsonEvent(data)
                usage = fork.dialect.usage(event, None)
                if usage is not None:
                    fork[USAGE] = usage
                found = self._read(fork, event.json())
            fork.finish(End(Outcome.COMPLETED, reply.status))
        except CallError as error:
            fork.finish(end_of(error, fork))
            return self._trouble(error.code)
        except BaseException as error:
            fork.finish(end_of(error, fork))
            raise
        finally:
            fork.close_bodies()
        if found is None:
            return self._trouble("not_read" if reply.status == 200 else f"status_{reply.status}")
        return found

    def _read(self, fork: Call, answer: Any) -> Embedding | None:
        """Source: OpenAI API reference, embeddings."""
        items = answer.get("data") if type(answer) is dict else None
        if type(items) is not list or len(items) != 1 or type(items[0]) is not dict:
            return None
        vector = self._unit(items[0].get("embedding"))
        if vector is None:
            return None
        target = _asked(fork)
        by = f"{target.upstream.name} {target.model} {str(answer.get('model'))[:200]}"
        return Embedding(vector, by)

    def _trouble(self, why: str) -> str:
        """Say so once, until it works again: calls go on without."""
        if not self._is_failing:
            self._is_failing = True
            fields = {"model": self._model, "why": why}
            self._kit.log.warning("embeddings_fail", extra=fields)
        return FAILED


def _asked(fork: Call) -> Target:
    target = fork.current_target
    assert target is not None
    return target


def _account(
    call: Call, fork: Call, text: str, before: tuple[Usage | None, Usage | None], end: End
) -> None:
    """Put what the fork took on the call: as reported, or as may be."""
    usage, lost = fork.get(USAGE), fork.get(LOST_USAGE)
    took = []
    if usage is not None and usage is not before[0]:
        took.append(usage)
    elif fork.attempts and may_have_served(end):
        took.append(Usage(tokens_of_text(text), is_estimated=True))
    if lost is not None and lost is not before[1]:
        lost_before = before[1].input if before[1] is not None else 0
        took.append(Usage(lost.input - lost_before, is_estimated=True))
    for each in took:
        side = SideCall(_asked(fork), fork.endpoint.name, each, fork.model or "")
        if SIDE_CALLS in call:
            call[SIDE_CALLS].append(side)
        else:
            call[SIDE_CALLS] = [side]


async def _whole(body: Body) -> bytes | None:
    """All of a body; None when it is too long or compressed. Raises what it broke off with."""
    if body.encoding not in ("", "identity"):
        body.discard()
        return None
    if body.is_whole:
        data = body.take()
        return data if len(data) <= MAX_BYTES else None
    taker = _Taker(body)
    body.attach(taker)
    return await taker.done


class _Taker:
    """The sink of a body that is wanted as a whole."""

    def __init__(self, body: Body) -> None:
        self.done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._body = body
        self._pieces: list[bytes] = []
        self._left = MAX_BYTES

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left >= 0:
            self._pieces.append(data)
            return
        self._body.discard()
        if not self.done.done():
            self.done.set_result(None)

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(b"".join(self._pieces))

    def fail(self, error: CallError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
