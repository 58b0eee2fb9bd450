"""The signing vectors: requests, credentials and times with what the providers' own code makes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("signing_vectors.json")


@cache
def all_vectors() -> list[dict[str, Any]]:
    """Every vector of the file; its `conventions` say how to read them."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["vectors"]
    return found


def vectors_of(scheme: str) -> list[dict[str, Any]]:
    return [each for each in all_vectors() if each["scheme"] == scheme]
