"""Limits asked by hand: what to take in one line, and its meter made for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from filters.stores.limits import Grant, Limits, Refusal, Rule, Slot


class Charge(NamedTuple):
    """What is taken of one rule."""

    key: str
    rule: Rule
    amount: int = 1


async def take(
    limits: Limits, charges: Sequence[Charge], slots: Sequence[Slot] = ()
) -> Grant | Refusal:
    """Take all of it or nothing."""
    meter = limits.meter([(key, rule) for key, rule, _ in charges], slots)
    return await meter.take([charge.amount for charge in charges])
