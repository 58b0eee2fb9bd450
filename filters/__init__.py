"""The filters that come with the sidecar: one file each. Nothing is imported until a chain asks."""

BUILTIN = {
    "access_log": "filters.access_log:AccessLog",
    "budget": "filters.budget:Budget",
    "cache": "filters.cache:Cache",
    "circuit_breaker": "filters.circuit_breaker:CircuitBreaker",
    "cost": "filters.cost:CallCost",
    "hedge": "filters.hedge:Hedge",
    "ledger": "filters.ledger:Ledger",
    "metrics": "filters.metrics:CallMetrics",
    "priority_queue": "filters.priority_queue:PriorityQueue",
    "prompt_saver": "filters.prompt_saver:PromptSaver",
    "rate_limit": "filters.rate_limit:RateLimit",
    "request_id": "filters.request_id:RequestId",
    "retry": "filters.retry:RetryCalls",
    "semantic_cache": "filters.semantic_cache:SemanticCache",
    "sign": "filters.sign:Sign",
    "timeout": "filters.timeout:Timeout",
    "token_budget": "filters.token_budget:TokenBudget",
    "token_counter": "filters.token_counter:TokenCounter",
    "upstream_limits": "filters.upstream_limits:UpstreamLimits",
}
