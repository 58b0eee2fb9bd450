"""Every test of this folder runs for each built-in filter, so that a new one is covered at once."""

from __future__ import annotations

import pytest

from filters import BUILTIN
from tests.contract.builtin import use_of
from tests.support.harness import Use


@pytest.fixture(params=sorted(BUILTIN))
def use(request: pytest.FixtureRequest) -> Use:
    return use_of(request.param)
