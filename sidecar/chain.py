"""Filters linked into one function, and the checks that a chain in a wrong order does not load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sidecar.call import Key
from sidecar.filter import AttemptFilter, AttemptNext, CallFilter, CallNext, Filter


def check_order(call: Sequence[type[Filter]], attempt: Sequence[type[Filter]]) -> list[str]:
    """What is wrong with a chain of these classes; empty when nothing is.

    The facts of the whole call chain are there for every attempt filter.
    """
    mistakes = []
    by_the_end = {key for each in (*call, *attempt) for key in each.gives}
    given: set[Key[Any]] = set()
    for place, kind, classes in (("call", CallFilter, call), ("attempt", AttemptFilter, attempt)):
        for index, filter_class in enumerate(classes):
            name = filter_class.__name__
            if not issubclass(filter_class, kind):
                other = "attempt" if place == "call" else "call"
                article = "an" if other == "attempt" else "a"
                mistakes.append(
                    f"{name} is {article} {other} filter: move it to the list `{other}`"
                )
                continue
            if missing := filter_class.needs - given:
                keys = ", ".join(sorted(key.name for key in missing))
                mistakes.append(f"{name} needs {keys}: put a filter that gives it before it")
            if missing := filter_class.reads - by_the_end:
                keys = ", ".join(sorted(key.name for key in missing))
                mistakes.append(f"{name} reads {keys}: put a filter that gives it into the chain")
            if filter_class.must_be_last and index != len(classes) - 1:
                mistakes.append(f"{name} must be the last of the list `{place}`")
            given |= filter_class.gives
    return mistakes


def link_call(filters: Iterable[CallFilter], last: CallNext) -> CallNext:
    """One function that runs `filters` in their order around `last`."""
    chain = last
    for each in reversed(list(filters)):
        chain = _link(each.handle, chain)
    return chain


def link_attempt(filters: Iterable[AttemptFilter], last: AttemptNext) -> AttemptNext:
    """One function that runs `filters` in their order around `last`."""
    chain = last
    for each in reversed(list(filters)):
        chain = _link(each.handle, chain)
    return chain


def _link(handle: Any, after: Any) -> Any:
    # A plain function that returns the filter's own coroutine: no coroutine of ours in between.
    def call_next(subject: Any) -> Any:
        return handle(subject, after)

    return call_next
