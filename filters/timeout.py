"""Other timeouts than the upstream's, for a team or a model."""

from __future__ import annotations

from collections.abc import Awaitable

from pydantic import PositiveFloat

from filters.algo.by_model import ByModel
from sidecar.api import Attempt, AttemptFilter, AttemptNext, FilterConfig, Kit, Reply, Timeouts

MAX_KEPT = 1000
"""Merged timeouts that are kept; a pattern lets callers name any model."""
MAX_NAME = 200
"""Longer names of models are looked up each time, so that what is kept stays small."""


class Overrides(FilterConfig):
    """Timeouts that replace the upstream's; what is left out stays."""

    connect_s: PositiveFloat | None = None
    first_byte_s: PositiveFloat | None = None
    silence_s: PositiveFloat | None = None
    total_s: PositiveFloat | None = None


class Timeout(AttemptFilter):
    """Replaces the upstream's timeouts for some models, or for a team.

    Switch it on where one model thinks for minutes before its first byte, or one team would rather
    have an error than wait. Place it anywhere in the attempt list before `sign`. A deadline that
    the caller sends still ends the wait for the first byte earlier.
    """

    class Config(FilterConfig):
        """What is null stays the upstream's."""

        connect_s: PositiveFloat | None = None
        """Name, free connection, TCP, proxy and TLS together."""
        first_byte_s: PositiveFloat | None = None
        """From the request written to the first byte of the answer's body."""
        silence_s: PositiveFloat | None = None
        """Between two reads of the answer."""
        total_s: PositiveFloat | None = None
        """The whole attempt."""
        models: dict[str, Overrides] = {}
        """The same four for some models, by name or pattern; go before those above."""

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._own = config.model_dump(exclude_none=True, exclude={"models"})
        self._by_model = ByModel(
            {name: each.model_dump(exclude_none=True) for name, each in config.models.items()}
        )
        self.is_idle = not (self._own or config.models)
        self._kept: dict[tuple[str, str | None], tuple[Timeouts, Timeouts]] = {}
        """By upstream and model: what the attempt came with, and what it gets instead."""

    def handle(self, attempt: Attempt, call_next: AttemptNext) -> Awaitable[Reply]:
        kept = self._kept.get((attempt.upstream.name, attempt.call.model))
        before = attempt.timeouts
        if kept is not None and kept[0] is before:
            attempt.timeouts = kept[1]
        else:
            attempt.timeouts = self._merge(attempt.upstream.name, attempt.call.model, before)
        return call_next(attempt)

    def _merge(self, upstream: str, model: str | None, before: Timeouts) -> Timeouts:
        values = {**self._own, **(self._by_model.find(model) or {})}
        merged = Timeouts(
            connect_s=values.get("connect_s", before.connect_s),
            first_byte_s=values.get("first_byte_s", before.first_byte_s),
            silence_s=values.get("silence_s", before.silence_s),
            total_s=values.get("total_s", before.total_s),
        )
        if model is None or len(model) <= MAX_NAME:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[upstream, model] = (before, merged)
        return merged
