"""One path that a dialect knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name` is a word for labels and logs; `has_model`: it names a model, in its JSON body unless
    `model_in_path`, where the last part of the path is the model."""

    name: str
    path: str
    has_model: bool = True
    model_in_path: bool = False


MODELS = Endpoint("models", "/v1/models", has_model=False)
PASS_THROUGH = Endpoint("pass_through", "", has_model=False)
OTHER = Endpoint("other", "", has_model=True)
