"""One id for a call, on the client's answer, at the upstream and in our log."""

from __future__ import annotations

import re
from collections.abc import Awaitable

from sidecar.api import Call, CallFilter, CallNext, FilterConfig, HeaderName, Kit, Reply, field

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch


class RequestId(CallFilter):
    """Takes the caller's request id, or makes one, and hands it to both sides.

    Switch it on to find a call again at the provider. Place it first, so that every other filter
    and every error carries the id.
    """

    class Config(FilterConfig):
        header: HeaderName = "x-request-id"
        """The header that carries the id, in all three directions."""
        accept: bool = True
        """Take the caller's id when it is 1 to 128 letters, digits or `._:-`."""

    sees_refused = True

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._header = config.header
        self._accept = config.accept
        self._name, _ = field(config.header, "")

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if self._accept:
            theirs = call.headers.get(self._header)
            if theirs is not None and _ACCEPTABLE(theirs):
                call.id = theirs
        value = call.id.encode()  # of our own making, or of acceptable characters: checked
        call.put_upstream_field(self._name, value)
        call.put_reply_field(self._name, value)
        return call_next(call)
