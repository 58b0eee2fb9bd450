"""Configurations written to a directory of their own, and stand-ins for the built-in filters."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

import filters
from sidecar.api import Secret
from sidecar.call import Key
from sidecar.config import Bound, Loaded, bind, load_config
from sidecar.errors import ConfigError
from sidecar.filter import AttemptFilter, CallFilter, FilterConfig

FACT = Key[int]("fact")


class Plain(CallFilter):
    pass


class Limit(CallFilter):
    class Config(FilterConfig):
        per_minute: int
        burst: int = 1
        backend: dict[str, int] = {}


class Gives(CallFilter):
    gives = frozenset({FACT})


class Needs(CallFilter):
    needs = frozenset({FACT})


class Reads(CallFilter):
    reads = frozenset({FACT})


class Webhook(CallFilter):
    class Config(FilterConfig):
        token: Secret
        label: str | int = ""


class Sign(AttemptFilter):
    must_be_last = True

    class UpstreamConfig(FilterConfig):
        scheme: Literal["bearer", "header"]
        key: Secret


class Breaker(AttemptFilter):
    class UpstreamConfig(FilterConfig):
        failures: int = 5


class BadConfig(CallFilter):
    class Config:  # type: ignore[assignment]
        pass


BUILTIN: dict[str, type] = {
    "plain": Plain,
    "limit": Limit,
    "gives": Gives,
    "needs": Needs,
    "reads": Reads,
    "webhook": Webhook,
    "sign": Sign,
    "breaker": Breaker,
    "bad_config": BadConfig,
}

SMALLEST = """\
upstreams:
  mock: {dialect: openai, base_url: "mock:"}
chains:
  default: {call: [], attempt: []}
"""


class Place:
    """One directory with configuration files. Messages come back with paths relative to it."""

    SMALLEST: ClassVar[str] = SMALLEST

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environ: dict[str, str] = {}

    def at(self, name: str) -> Place:
        """A place below this one."""
        return Place(self.directory / name)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def load(self, config: str | bytes = SMALLEST, **teams: str) -> Loaded:
        """Loads `config`, with one file of `teams/` for each keyword."""
        for name, text in teams.items():
            self.write(f"teams/{name}.yaml", text)
        return load_config(self.write("config.yaml", config), self.environ)

    def bind(self, config: str | bytes = SMALLEST, **teams: str) -> Bound:
        return bind(self.load(config, **teams), self.environ)

    def problems(self, config: str | bytes = SMALLEST, **teams: str) -> list[str]:
        """Every problem of loading and, when there is none, of binding."""
        try:
            self.bind(config, **teams)
        except ConfigError as error:
            return [str(each).replace(f"{self.directory}/", "") for each in error.problems]
        return []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("builtin_stand_ins")
    for each in BUILTIN.values():
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    table = {name: f"{module.__name__}:{each.__name__}" for name, each in BUILTIN.items()}
    monkeypatch.setattr(filters, "BUILTIN", table)


@pytest.fixture
def chain() -> Callable[..., str]:
    """A configuration with these filters in its chain; more text may follow."""

    def make(call: str = "", attempt: str = "", more: str = "") -> str:
        return (
            'upstreams:\n  mock: {dialect: openai, base_url: "mock:"}\n'
            f"chains:\n  default: {{call: [{call}], attempt: [{attempt}]}}\n{more}"
        )

    return make
