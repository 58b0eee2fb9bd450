"""Credentials of the upstream, put on every attempt."""

from __future__ import annotations

from collections.abc import Awaitable

from filters.signers.settings import SignSettings
from filters.signers.signer import UpstreamSigner
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    FilterConfig,
    Kit,
    Phase,
    Reply,
    Retry,
    UpstreamError,
    no_key_room,
)


class Sign(AttemptFilter):
    """Authenticates us at the upstream with its own key; the client's never gets that far.

    Place it last, so that it signs the request as it goes on the wire, each time anew. An upstream
    without a `sign` section gets no credentials.
    """

    UpstreamConfig = SignSettings
    must_be_last = True

    def __init__(self, config: FilterConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self._signers = {
            name: UpstreamSigner(name, settings, kit) for name, settings in kit.upstreams.items()
        }

    def handle(self, attempt: Attempt, call_next: AttemptNext) -> Awaitable[Reply]:
        upstream = attempt.upstream
        signer = self._signers.get(upstream.name)
        if signer is None:
            return call_next(attempt)
        if upstream.host != signer.host or upstream.scheme != signer.url_scheme:
            message = "the credentials belong to another address than this upstream's"
            raise UpstreamError(Phase.SIGN, Retry.NO, "upstream_origin_mismatch", message)
        always = signer.always
        if always is None:
            return signer.run(attempt, call_next)
        gate = attempt.key_gate
        if gate is not None:
            attempt.key_gate = None
            wait_s = gate(signer.digests[0])
            if not isinstance(wait_s, float):
                return signer.run_fixed(wait_s, attempt, call_next)
            if wait_s:
                raise no_key_room(wait_s)
        attempt.headers.put(always)
        attempt.on_end(signer.ended)
        return call_next(attempt)
