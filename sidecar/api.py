"""All that a filter may import."""

from sidecar.addresses import is_forbidden, literal
from sidecar.call import (
    USAGE,
    Attempt,
    Call,
    ChatView,
    End,
    Key,
    Outcome,
    Target,
    Timeouts,
    Upstream,
    Usage,
)
from sidecar.clock import Clock
from sidecar.config.secret import Secret
from sidecar.errors import CallError, FetchFailed, Phase, Rejected, Retry, UpstreamError
from sidecar.filter import (
    AttemptFilter,
    AttemptNext,
    CallFilter,
    CallNext,
    Fetch,
    Fetched,
    Filter,
    FilterConfig,
    HeaderName,
    Kit,
)
from sidecar.headers import Headers, field, sendable_name, sendable_value
from sidecar.metrics import SHORT_SECONDS, Counter, Gauge, Histogram, Metrics
from sidecar.reply import Body, Reply, Source, Transformer
from sidecar.sse import Event
from sidecar.team import Team

__all__ = [
    "SHORT_SECONDS",
    "USAGE",
    "Attempt",
    "AttemptFilter",
    "AttemptNext",
    "Body",
    "Call",
    "CallError",
    "CallFilter",
    "CallNext",
    "ChatView",
    "Clock",
    "Counter",
    "End",
    "Event",
    "Fetch",
    "FetchFailed",
    "Fetched",
    "Filter",
    "FilterConfig",
    "Gauge",
    "HeaderName",
    "Headers",
    "Histogram",
    "Key",
    "Kit",
    "Metrics",
    "Outcome",
    "Phase",
    "Rejected",
    "Reply",
    "Retry",
    "Secret",
    "Source",
    "Target",
    "Team",
    "Timeouts",
    "Transformer",
    "Upstream",
    "UpstreamError",
    "Usage",
    "field",
    "is_forbidden",
    "literal",
    "sendable_name",
    "sendable_value",
]
