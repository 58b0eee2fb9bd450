"""The benchmark's figures that are taken in one process still run; the others need their own cores.

What they measure is no test's business.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.figures import QUICK, Results
from bench.signing import SETTINGS, signing


async def test_every_scheme_is_measured(tmp_path: Path) -> None:
    results = Results(tmp_path, repeat_s=0.0)
    await signing((), replace(QUICK, sign_rounds=1, sign_attempts=3), results)
    assert {name for name in SETTINGS if (results.get(name, "sign_us") or 0.0) > 0.0} == {*SETTINGS}
