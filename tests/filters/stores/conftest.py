"""A real server for the stores that share their state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from filters.stores import redis
from tests.support.valkey import Valkey


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One for all tests, each of which uses a prefix of its own and leaves the server alone."""
    with Valkey() as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """For tests that stop or pause it."""
    with Valkey() as server:
        yield server


@pytest.fixture
def impatient() -> None:
    """For tests that pause the server: an answer may take as long as in the product."""


@pytest.fixture
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all other tests: a busy machine does not make the server look dead."""
    if "impatient" not in request.fixturenames:
        monkeypatch.setattr(redis, "ANSWER_S", 20.0)
