"""One loaded configuration, live: upstreams, filters, chains. Immutable once started.

Bound ──build──► Snapshot ──start──► leased by calls ──retire──► stopped when the last one ends
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.call import Target, digest
from sidecar.chain import link_attempt, link_call
from sidecar.clock import Clock
from sidecar.config import Bound, BoundPolicy, FilterSpec
from sidecar.dispatch import Dispatch, send
from sidecar.errors import CallError, Rejected
from sidecar.filter import (
    AttemptFilter,
    CallFilter,
    Fetched,
    Filter,
    Kit,
    KitResources,
    StoreAddress,
)
from sidecar.metrics import Counter, Metrics
from sidecar.reply import Reply
from sidecar.resources import Resources
from sidecar.tasks import Tasks
from sidecar.team import Callers, Models, Patterns, Policy, Team
from sidecar.transport.connect import Origin
from sidecar.transport.fetch import fetch
from sidecar.transport.upstream import LiveUpstream, open_pool, parse_base_url, pool_key

log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What outlives snapshots."""

    resources: Resources
    metrics: Metrics
    tasks: Tasks
    clock: Clock
    access_log: Callable[[Mapping[str, Any]], None]
    workers: int = 1
    """Processes that serve; a reload does not change it."""


class Snapshot:
    """A live configuration. Calls lease it; it stops when it is retired and the last lease ends."""

    def __init__(self, bound: Bound, shared: Shared, generation: int) -> None:
        self.bound = bound
        self.http = bound.config.http
        self.tasks = shared.tasks
        self.dropped_taps: Counter = shared.metrics.counter(
            "llm_sidecar_dropped_taps", "Observers of a body that failed and were dropped."
        ).child()
        self.upstreams: dict[str, LiveUpstream] = {}
        self.models = Models({})
        self.callers: Callers
        self._team_keys = frozenset(key.sha256() for team in bound.teams for key in team.keys)
        self._origins: dict[str, tuple[str, str]] = {}
        self._places: dict[str, str] = {}
        self._shared = shared
        self._generation = generation
        self._filters: list[Filter] = []
        self._started: list[Filter] = []
        self._leases = 0
        self._is_retiring = False
        self._unused = asyncio.Event()

    def lease(self) -> None:
        self._leases += 1

    def release(self) -> None:
        self._leases -= 1
        if not self._leases and self._is_retiring:
            self._unused.set()

    @property
    def open_calls(self) -> int:
        return self._leases

    async def start(self) -> None:
        """Build everything and start the filters. On an error nothing of it is left running."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._open_upstreams()
                self._compile()
                for each in self._filters:
                    self._started.append(each)
                    await each.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the filters, newest first, and let go of what no other snapshot uses."""
        while self._started:
            each = self._started.pop()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await each.stop()
            except Exception:
                log.exception("filter_stop_failed", extra={"filter": type(each).__name__})
        await self._shared.resources.drop_user(self._generation)

    async def retire(self) -> None:
        """Stop once the last running call has ended."""
        self._is_retiring = True
        if self._leases:
            await self._unused.wait()
        await self.stop()

    # Building

    async def _open_upstreams(self) -> None:
        resources = self._shared.resources
        for name, settings in self.bound.config.upstreams.items():
            if settings.base_url == "mock:":
                from sidecar.mock.embedded import EmbeddedProvider  # only when it is asked for

                provider = resources.get(("mock",), EmbeddedProvider, user=self._generation)
                origin = Origin("http", "localhost", 80, unix_path=await provider.start())
                base_path = ""
            else:
                origin, base_path = parse_base_url(settings.base_url)
            if settings.tls.insecure_skip_verify:
                log.warning("tls_not_verified", extra={"upstream": name})

            def open_this(settings: Any = settings, origin: Origin = origin) -> Any:
                return open_pool(settings, origin)

            pool = resources.get(pool_key(name, settings), open_this, user=self._generation)
            self.upstreams[name] = LiveUpstream(
                name, settings, origin=origin, base_path=base_path, pool=pool
            )
            self._origins[name] = (self.upstreams[name].scheme, self.upstreams[name].host)
            place = (settings.base_url, settings.dialect, sorted(settings.headers.items()))
            self._places[name] = digest(repr(place))[:16]

    def _compile(self) -> None:
        config = self.bound.config
        self.models = Models(
            {
                name: tuple(
                    Target(self.upstreams[each.upstream], each.model) for each in model.targets
                )
                for name, model in config.models.items()
            }
        )
        policies = {each.team.team: self._policy(each) for each in self.bound.policies}
        by_key = {
            key.sha256(): policies[team.team] for team in self.bound.teams for key in team.keys
        }
        if config.team is not None:
            fixed = policies[config.team]
        elif not self.bound.teams:
            fixed = next(iter(policies.values()))
        else:
            fixed = None
        self.callers = Callers(by_key, fixed=fixed, unknown=self._nobody())

    def _policy(self, bound: BoundPolicy) -> Policy:
        settings = bound.team
        team = Team(
            name=settings.team,
            priority=settings.priority,
            models=Patterns(settings.models),
            upstreams=frozenset(settings.upstreams),
        )
        specs = (*bound.call, *bound.attempt)
        taps_events = any(spec.filter_class.taps_events for spec in specs)
        call_filters: list[CallFilter] = self._make(bound.call, team.name)
        attempt_filters: list[AttemptFilter] = self._make(bound.attempt, team.name)
        dispatch = Dispatch(
            models=self.models,
            taps_events=taps_events,
            reads_beginnings=any(spec.filter_class.reads_beginnings for spec in specs),
            team_keys=self._team_keys,
        )
        dispatch.attempt_chain = link_attempt(attempt_filters, send)
        observers = [each for each in call_filters if each.sees_refused]
        return Policy(
            team=team,
            run=link_call(call_filters, dispatch),
            refuse=link_call(observers, _refuse),
        )

    def _find_model(self, name: str) -> tuple[Target, ...] | None:
        found = self.models.find(name)
        if found is None:
            return None
        return tuple(Target(each.upstream, each.model or name) for each in found[1])

    async def _fetch(
        self, upstream: str, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Fetched:
        settings = self.bound.config.upstreams[upstream]
        return await fetch(settings, method, url, headers, body)

    def _nobody(self) -> Policy:
        """Refuses callers with an unknown key, and lets observers see it."""
        team = Team("unknown", "low", Patterns(()), frozenset())
        specs = [
            spec
            for spec in self.bound.policies[0].call
            if getattr(spec.filter_class, "sees_refused", False)
        ]
        refuse = link_call(self._make(specs, team.name), _refuse)
        return Policy(team=team, run=refuse, refuse=refuse)

    def _make(self, specs: Sequence[FilterSpec], team: str) -> list[Any]:
        config = self.bound.config
        made = []
        for spec in specs:
            kit = Kit(
                clock=self._shared.clock,
                metrics=self._shared.metrics,
                tasks=self.tasks,
                log=_logger(spec.filter_class),
                access_log=self._shared.access_log,
                team=team,
                upstreams=self.bound.upstream_sections.get(spec.name, {}),
                origins=self._origins,
                places=self._places,
                fetch=self._fetch,
                store=StoreAddress(**dict(config.store)),
                data_dir=Path(config.data_dir) if config.data_dir is not None else None,
                find_model=self._find_model,
                workers=self._shared.workers,
                max_connections=sum(
                    upstream.pool.max_connections for upstream in config.upstreams.values()
                ),
                resources=KitResources(self._shared.resources, self._generation),
            )
            made.append(spec.filter_class(spec.config, kit))
        self._filters.extend(made)
        return made


def _logger(filter_class: type[Filter]) -> logging.Logger:
    """Below `filters`, wherever the filter comes from: so `log.level` is its level, too."""
    module = filter_class.__module__
    return logging.getLogger(module if module.startswith("filters.") else f"filters.{module}")


async def _refuse(call: Any) -> Reply:
    refusal: CallError = call.refusal or Rejected(500, "internal_error", "refused without a reason")
    raise refusal
