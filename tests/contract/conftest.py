"""Every test of this folder runs for each built-in filter, so that a new one is covered at once."""

from __future__ import annotations

import pytest

from tests.contract.builtin import uses
from tests.support.harness import Use

USES = uses()


@pytest.fixture(params=USES)
def use(request: pytest.FixtureRequest) -> Use:
    return USES[request.param]
