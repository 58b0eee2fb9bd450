"""A setting is found by the model's name or by a pattern."""

from __future__ import annotations

import pytest

from filters.algo.by_model import ByModel

SETTINGS = ByModel({"gpt-*": 1, "gpt-4o": 2, "gpt-4*": 3, "o?": 4, "llama[7b]": 5, "qwen[*]": 6})


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("gpt-4o", 2),  # its own name goes before patterns
        ("gpt-4o-mini", 1),  # the first pattern that fits
        ("o3", 4),
        ("o33", None),
        ("llama[7b]", 5),
        ("llama7", None),
        ("qwen[14b]", 6),
        ("qwen1", None),
        ("x-gpt-4", None),
        ("", None),
        (None, None),
    ],
)
def test_own_name_first_then_the_first_pattern(model: str | None, found: int | None) -> None:
    assert SETTINGS.find(model) == found


def test_nothing_is_found_in_nothing() -> None:
    assert not ByModel({})
    assert ByModel[int]({}).find("gpt") is None
