"""Filters linked into one function, and the checks that a chain in a wrong order does not load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sidecar.call import Key
from sidecar.filter import AttemptFilter, AttemptNext, CallFilter, CallNext, Filter


class Misplaced(NamedTuple):
    """A filter that cannot stand where it does."""

    kind: str
    """Its list, `call` or `attempt`."""
    at: int
    """Its index there."""
    message: str
    """What is wrong, to be read behind its name, and how to mend it."""


Giver = tuple[str, str]
"""A filter that gives a fact: its name, and the list that it belongs into."""


def _nobody(key: Key[Any]) -> Giver | None:
    return None


def check_order(
    call: Sequence[type[Filter]],
    attempt: Sequence[type[Filter]],
    giver_of: Callable[[Key[Any]], Giver | None] = _nobody,
) -> list[Misplaced]:
    """What is wrong with a chain of these classes; empty when nothing is.

    The facts of the whole call chain are there for every attempt filter. `giver_of` is asked for
    a filter to name in a message; None: there is none to name.
    """
    mistakes = []
    by_the_end = {key for each in (*call, *attempt) for key in each.gives}
    given: set[Key[Any]] = set()
    for place, base, classes in (("call", CallFilter, call), ("attempt", AttemptFilter, attempt)):
        for index, filter_class in enumerate(classes):
            messages = []
            if not issubclass(filter_class, base):
                other = "an attempt" if place == "call" else "a call"
                text = f"is {other} filter: move it to the list `{other.split()[1]}`"
                mistakes.append(Misplaced(place, index, text))
                continue
            for key in _sorted(filter_class.needs - given):
                name, _ = giver_of(key) or ("a filter that gives it", "")
                messages.append(f"needs {key.name}: put {name} before it")
            for key in _sorted(filter_class.reads - by_the_end):
                giver = giver_of(key)
                mend = "put a filter that gives it into the chain"
                if giver is not None:
                    mend = f"add {giver[0]}, which gives it, to the list `{giver[1]}`"
                messages.append(f"reads {key.name}: {mend}")
            if filter_class.must_be_last and index != len(classes) - 1:
                messages.append(f"must be the last of the list `{place}`: move it there")
            mistakes += [Misplaced(place, index, each) for each in messages]
            given |= filter_class.gives
    return mistakes


def _sorted(keys: Iterable[Key[Any]]) -> list[Key[Any]]:
    return sorted(keys, key=lambda key: key.name)


def link_call(filters: Iterable[CallFilter], last: CallNext) -> CallNext:
    """One function that runs `filters` in their order around `last`; idle ones are left out."""
    return _run_through(filters, last)  # type: ignore[no-any-return]


def link_attempt(filters: Iterable[AttemptFilter], last: AttemptNext) -> AttemptNext:
    """One function that runs `filters` in their order around `last`; idle ones are left out."""
    return _run_through(filters, last)  # type: ignore[no-any-return]


def _run_through(filters: Iterable[Filter], last: Any) -> Any:
    chain = last
    for each in reversed([each for each in filters if not each.is_idle]):
        chain = _link(each.handle, chain)  # type: ignore[attr-defined]  # of both kinds
    return chain


def _link(handle: Any, after: Any) -> Any:
    # A plain function that returns the filter's own coroutine: no coroutine of ours in between.
    def call_next(subject: Any) -> Any:
        return handle(subject, after)

    return call_next
