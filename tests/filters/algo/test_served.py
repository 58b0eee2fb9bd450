"""What the end of an attempt says of what its provider did."""

from __future__ import annotations

import pytest

from filters.algo.served import may_have_served, was_sent
from sidecar.api import CallError, End, Outcome, Phase, Rejected, Retry, UpstreamError


def failed(phase: Phase) -> End:
    error = UpstreamError(phase, Retry.SAME, "upstream_failed", "it failed")
    return End(Outcome.UPSTREAM_FAILED, error.status, error)


def rejected(status: int) -> End:
    return End(Outcome.REJECTED, status, Rejected(status, "refused", "no"))


UNSENT = (Phase.ADMIT, Phase.SIGN, Phase.RESOLVE, Phase.POOL, Phase.CONNECT, Phase.TLS)


@pytest.mark.parametrize("phase", Phase)
def test_a_failure_says_by_its_phase_whether_the_request_left(phase: Phase) -> None:
    assert was_sent(failed(phase)) == (phase not in UNSENT)


@pytest.mark.parametrize("phase", Phase)
def test_only_a_request_that_left_and_was_not_refused_may_have_been_served(phase: Phase) -> None:
    served = phase in (Phase.SEND, Phase.HEAD, Phase.BODY)
    assert may_have_served(failed(phase)) == served


@pytest.mark.parametrize(
    ("end", "sent", "served"),
    [
        (End(Outcome.COMPLETED, 200), True, True),
        (End(Outcome.COMPLETED, 429), True, False),
        (End(Outcome.COMPLETED, 500), True, False),
        (End(Outcome.CLIENT_GONE, 0), True, True),
        (End(Outcome.DISCARDED, 200), True, True),
        (End(Outcome.ABORTED, 500, CallError(500, "internal_error", "")), True, True),
        (rejected(429), False, False),
        (rejected(504), True, True),  # the deadline passed while the upstream worked
    ],
    ids=repr,
)
def test_every_other_end_says_so_too(end: End, sent: bool, served: bool) -> None:
    assert (was_sent(end), may_have_served(end)) == (sent, served)
