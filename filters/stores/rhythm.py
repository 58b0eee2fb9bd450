"""A recorded stream that comes again as it came the first time."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.api import Body, Clock, Timer


class Rhythm:
    """The source of a body whose pieces come at their times: `rhythm` has, for each, milliseconds
    since the first one, and bytes. While nobody takes them time stands still."""

    def __init__(self, clock: Clock, data: bytes, rhythm: Sequence[tuple[int, int]]) -> None:
        self.body = Body(self, media_type="text/event-stream")
        self._clock = clock
        self._data = data
        self._rhythm = rhythm
        self._next = 0  # the piece that comes next
        self._at = 0  # where it begins
        self._is_paused = False
        self._is_over = False
        self._timer: Timer | None = None
        self._feed()

    def pause(self) -> None:
        self._is_paused = True
        self._cancel()

    def resume(self) -> None:
        self._is_paused = False
        if self._timer is None and not self._is_over:
            self._wait()

    def abort(self) -> None:
        self._is_over = True
        self._cancel()

    def _cancel(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _wait(self) -> None:
        """Until the next piece is due."""
        if self._next >= len(self._rhythm):
            self._is_over = True
            self.body.finish()
            return
        last_ms = self._rhythm[self._next - 1][0] if self._next else 0
        self._timer = self._clock.call_later(
            max(0, self._rhythm[self._next][0] - last_ms) / 1000, self._feed
        )

    def _feed(self) -> None:
        self._timer = None
        size = self._rhythm[self._next][1]
        piece = self._data[self._at : self._at + size]
        self._next += 1
        self._at += size
        self.body.feed(piece)
        if not self._is_paused and not self._is_over and self._timer is None:
            self._wait()
