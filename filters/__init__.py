"""The filters that come with the sidecar: one file each. Nothing is imported until a chain asks."""

BUILTIN = {
    "access_log": "filters.access_log:AccessLog",
    "metrics": "filters.metrics:CallMetrics",
    "request_id": "filters.request_id:RequestId",
    "sign": "filters.sign:Sign",
    "token_counter": "filters.token_counter:TokenCounter",
}
