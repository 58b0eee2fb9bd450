"""Which failures pass by themselves, in the words of each provider."""

from __future__ import annotations

from typing import get_args

import pytest

from filters.algo.refusals import Told
from filters.algo.retry_rules import PROVIDERS, Provider, Rules, Verdict, provider_of

PASS, NEVER, AGAIN, SLOWER, ONCE = (
    *(Verdict.PASS, Verdict.NEVER, Verdict.AGAIN, Verdict.SLOWER, Verdict.ONCE),
)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 507, 520, 529, 599])
def test_temporary_statuses_are_tried_again_everywhere(status: int) -> None:
    assert {rules.judge(status, Told()) for rules in PROVIDERS.values()} == {AGAIN}


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 425, 501, 505])
def test_what_stays_wrong_is_not(status: int) -> None:
    assert {rules.judge(status, Told()) for rules in PROVIDERS.values()} == {PASS}


CODES: list[tuple[Provider, int, str, Verdict]] = [
    ("openai", 429, "rate_limit_exceeded", AGAIN),
    ("openai", 429, "insufficient_quota", NEVER),
    ("openai", 429, "credit_balance_exhausted", NEVER),
    ("openai", 429, "organization_spend_limit_exceeded", NEVER),
    ("openai", 429, "project_spend_limit_exceeded", NEVER),
    ("openai", 429, "organization_usage_limit_exceeded", NEVER),
    ("openai", 409, "invalid_request_error", AGAIN),
    ("anthropic", 429, "ramp_limit_exceeded", AGAIN),
    ("anthropic", 429, "enforced_spend_limit_reached", NEVER),
    ("anthropic", 429, "contract_spend_limit_reached", NEVER),
    ("anthropic", 529, "overloaded_error", AGAIN),
    *[("qianfan_v1", 200, each, AGAIN) for each in ("18", "4", "336100", "336501", "336502")],
    *[("qianfan_v1", 200, each, NEVER) for each in ("17", "19")],
    *[("qianfan_v1", 200, each, ONCE) for each in ("110", "111")],
    ("qianfan_v1", 200, "336003", PASS),
    ("qianfan", 429, "rpm_rate_limit_exceeded", AGAIN),
    ("qianfan", 200, "tpm_rate_limit_exceeded", AGAIN),
    ("dashscope", 429, "Throttling", AGAIN),
    ("dashscope", 200, "Throttling.RateQuota", AGAIN),
    ("dashscope", 429, "Throttling.BurstRate", AGAIN),
    ("dashscope", 429, "limit_requests", AGAIN),
    ("dashscope", 429, "Throttling.AllocationQuota", SLOWER),
    ("dashscope", 429, "insufficient_quota", SLOWER),
    ("dashscope", 400, "Arrearage", NEVER),
    ("hunyuan", 200, "LimitExceeded", AGAIN),
    ("hunyuan", 200, "RequestLimitExceeded", AGAIN),
    ("hunyuan", 200, "RequestLimitExceeded.UinLimitExceeded", AGAIN),
    ("hunyuan", 200, "RequestLimitExceeded.GlobalRegionUinLimitExceeded", AGAIN),
    ("hunyuan", 200, "FailedOperation.EngineServerLimitExceeded", AGAIN),
    ("hunyuan", 200, "ResourceInsufficient.ChargeResourceExhaust", NEVER),
    ("hunyuan", 200, "FailedOperation.FreeResourcePackExhausted", NEVER),
    ("hunyuan", 200, "FailedOperation.ResourcePackExhausted", NEVER),
    ("hunyuan", 200, "FailedOperation.ServiceStopArrears", NEVER),
    ("hunyuan", 200, "FailedOperation.SetPayModeExceed", NEVER),
    ("hunyuan", 200, "ResourceUnavailable.InArrears", NEVER),
    ("hunyuan", 200, "ResourceUnavailable.LowBalance", NEVER),
    ("hunyuan", 200, "AuthFailure.SignatureFailure", PASS),
    ("hunyuan_openai", 400, "2003", AGAIN),
    ("hunyuan_openai", 400, "2001", PASS),
    ("ark", 429, "RateLimitExceeded.EndpointTPMExceeded", AGAIN),
    ("ark", 429, "ServerOverloaded", AGAIN),
    ("ark", 429, "QuotaExceeded", NEVER),
    ("ark", 403, "AccountOverdueError", NEVER),
    ("bedrock", 429, "ThrottlingException", AGAIN),
    ("bedrock", 429, "ModelNotReadyException", AGAIN),
    ("bedrock", 424, "ModelErrorException", AGAIN),
    ("bedrock", 400, "ServiceQuotaExceededException", NEVER),
    ("bedrock", 400, "ValidationException", PASS),
    *[("zhipu", 429, each, AGAIN) for each in ("1302", "1303", "1305", "1312")],
    *[
        ("zhipu", 429, each, NEVER)
        for each in ("1113", "1304", "1308", "1309", "1310", "1311", "1313")
    ],
    *[("spark", 200, each, AGAIN) for each in ("10007", "10008", "10110", "11202", "11203")],
    *[("spark", 200, each, NEVER) for each in ("11200", "11201")],
    ("gemini", 429, "RESOURCE_EXHAUSTED", AGAIN),
    ("gemini", 503, "UNAVAILABLE", AGAIN),
    ("ollama", 503, "", AGAIN),
    ("none", 429, "insufficient_quota", AGAIN),
]


@pytest.mark.parametrize(("provider", "status", "code", "verdict"), CODES)
def test_codes_mean_what_the_provider_says(
    provider: Provider, status: int, code: str, verdict: Verdict
) -> None:
    assert PROVIDERS[provider].judge(status, Told((code,))) is verdict


def test_a_money_code_beside_a_rate_code_wins() -> None:
    rules = PROVIDERS["hunyuan"]
    told = Told(("RequestLimitExceeded", "ResourceUnavailable.InArrears"))
    assert rules.judge(429, told) is NEVER


def test_quota_that_is_used_up_is_not_waited_for() -> None:
    assert PROVIDERS["gemini"].judge(429, Told((), 5.0, is_used_up=True)) is NEVER


def test_upstream_says_itself_whether_to_retry() -> None:
    rules = PROVIDERS["openai"]
    assert rules.judge(503, Told(), "false") is NEVER
    assert rules.judge(400, Told(), "false") is PASS
    assert rules.judge(400, Told(), "true") is AGAIN
    assert rules.judge(503, Told(), "true") is AGAIN
    assert rules.judge(503, Told(), "maybe") is AGAIN
    # It does not know better than its own bill.
    assert rules.judge(429, Told(("insufficient_quota",)), "true") is NEVER


def test_configured_words_go_over_the_provider_s() -> None:
    rules = PROVIDERS["openai"].with_own(
        [425, "insufficient_quota", "Busy.*", 1302], [503, "rate_limit_exceeded", "Busy.Forever"]
    )
    assert rules.judge(425, Told()) is AGAIN
    assert rules.judge(429, Told(("insufficient_quota",))) is AGAIN
    assert rules.judge(400, Told(("Busy.Today.Really",))) is AGAIN
    assert rules.judge(400, Told(("Busy.Forever",))) is NEVER
    assert rules.judge(400, Told(("Busyness",))) is PASS
    assert rules.judge(400, Told(("1302",))) is AGAIN
    assert rules.judge(503, Told()) is NEVER
    assert rules.judge(429, Told(("rate_limit_exceeded",))) is NEVER
    assert rules.judge(200, Told(("425",))) is PASS


def test_longer_prefixes_are_known_too() -> None:
    rules = Rules(again=frozenset({"A.B.*"}))
    assert rules.judge(400, Told(("A.B.C",))) is AGAIN
    assert rules.judge(400, Told(("A.B",))) is AGAIN
    assert rules.judge(400, Told(("A.C",))) is PASS


@pytest.mark.parametrize(
    ("provider", "code", "verdict"),
    [
        ("openai", "server_error", AGAIN),
        ("openai", "insufficient_quota", NEVER),
        ("openai", "context_length_exceeded", NEVER),
        ("anthropic", "overloaded_error", AGAIN),
        ("anthropic", "invalid_request_error", NEVER),
        ("dashscope", "insufficient_quota", SLOWER),
        ("none", "", AGAIN),
    ],
)
def test_error_event_is_temporary_unless_its_code_says_no(
    provider: Provider, code: str, verdict: Verdict
) -> None:
    assert PROVIDERS[provider].judge_event(code) is verdict


@pytest.mark.parametrize(
    ("provider", "data", "is_found"),
    [
        ("qianfan_v1", b'{"error_code":18,"error_msg":"m"}', True),
        ("qianfan_v1", b'{"id":"as-1","result":"hi","usage":{}}', False),
        ("qianfan", b'{"code":"rpm_rate_limit_exceeded","msg":"m"}', True),
        ("qianfan", b'data: {"id":"1","choices":[{"delta":{"content":"a"}}]}', False),
        ("dashscope", b'event:error\ndata:{"code":"Throttling","message":"m"}', True),
        ("dashscope", b'data:{"output":{"text":"a"},"usage":{},"code":""}', False),
        ("hunyuan", b'{"Response":{"Error":{"Code":"LimitExceeded"}}}', True),
        ("hunyuan", b'data: {"Choices":[],"ErrorMsg":{"Code":4001}}', True),
        ("hunyuan", b'{"Response":{"Choices":[],"ErrorMsg":null}}', False),
        ("spark", b'data:{"code":10007,"message":"m"}', True),
        ("spark", b'{"error":{"code":"10007"}}', True),
        ("spark", b'data:{"code":0,"message":"Success"}', False),
        ("spark", b'{"choices":[{"message":{"content":"{\\"code\\": 5}"}}],"code":0}', False),
    ],
)
def test_only_an_answer_that_may_be_an_error_is_read(
    provider: Provider, data: bytes, is_found: bool
) -> None:
    pattern = PROVIDERS[provider].within_200
    assert pattern is not None
    assert bool(pattern.search(data)) is is_found


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("api.openai.com", "openai"),
        ("eu.api.openai.com:443", "openai"),
        ("mine.openai.azure.com", "openai"),
        ("api.anthropic.com", "anthropic"),
        ("qianfan.baidubce.com", "qianfan"),
        ("aip.baidubce.com", "qianfan_v1"),
        ("dashscope.aliyuncs.com", "dashscope"),
        ("dashscope-intl.aliyuncs.com", "dashscope"),
        ("ws1.cn-beijing.maas.aliyuncs.com", "dashscope"),
        ("hunyuan.tencentcloudapi.com", "hunyuan"),
        ("hunyuan.ap-guangzhou.tencentcloudapi.com", "hunyuan"),
        ("api.hunyuan.cloud.tencent.com", "hunyuan_openai"),
        ("ark.cn-beijing.volces.com", "ark"),
        ("ark.ap-southeast.bytepluses.com", "ark"),
        ("bedrock-runtime.us-east-1.amazonaws.com", "bedrock"),
        ("bedrock-mantle.us-east-1.api.aws", "bedrock"),
        ("open.bigmodel.cn", "zhipu"),
        ("API.Z.AI", "zhipu"),
        ("spark-api-open.xf-yun.com", "spark"),
        ("generativelanguage.googleapis.com", "gemini"),
    ],
)
def test_provider_is_known_by_its_host(host: str, provider: str) -> None:
    assert provider_of(host, "openai") == provider


def test_unknown_host_speaks_its_dialect_s_words() -> None:
    assert provider_of("localhost:8000", "anthropic") == "anthropic"
    assert provider_of("[::1]:8000", "openai") == "openai"
    assert provider_of("gateway.example", "homemade") == "none"
    assert provider_of("openai.com.evil.example", "anthropic") == "anthropic"


def test_every_provider_has_rules() -> None:
    assert set(PROVIDERS) == set(get_args(Provider))
