"""Whether a provider may have worked, and counts tokens, for what it reported no usage of."""

from __future__ import annotations

from sidecar.api import COMPLETED, End, Outcome, Phase, UpstreamError

_UNSENT = frozenset({Phase.ADMIT, Phase.SIGN, Phase.RESOLVE, Phase.POOL, Phase.CONNECT, Phase.TLS})


def was_sent(end: End) -> bool:
    """Whether a provider may have seen the request of an attempt that ended so; in doubt, True."""
    if end.outcome is COMPLETED:
        return True
    error = end.error
    if isinstance(error, UpstreamError):
        return error.phase not in _UNSENT
    if end.outcome is Outcome.REJECTED:  # the deadline may have passed while it waited
        return end.status == 504
    return True


def may_have_served(end: End) -> bool:
    """What the end of a call, or of an attempt, that was made says; in doubt, True.

    False when the request never left, and when all that came is an error: as the answer, or as the
    first event of a 200.
    """
    if end.outcome is COMPLETED:
        return end.status < 400
    error = end.error
    if isinstance(error, UpstreamError) and error.phase is Phase.FIRST_EVENT:
        return False
    return was_sent(end)
