"""One path that a dialect knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name` is a word for labels and logs; `has_model`: its JSON body names a model."""

    name: str
    path: str
    has_model: bool = True


MODELS = Endpoint("models", "/v1/models", has_model=False)
PASS_THROUGH = Endpoint("pass_through", "", has_model=False)
OTHER = Endpoint("other", "", has_model=True)
