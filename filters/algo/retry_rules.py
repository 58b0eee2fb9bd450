"""What may be tried again, by status and by each provider's own words.

The status alone is not enough: 429 is also what OpenAI, Anthropic, Zhipu and Ark say when the money
is gone, Tencent says a rate limit with 400, and Qianfan v1 says everything with 200.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Literal

from filters.algo.refusals import Told

Provider = Literal[
    "none",
    "openai",
    "anthropic",
    "qianfan",
    "qianfan_v1",
    "dashscope",
    "hunyuan",
    "hunyuan_openai",
    "ark",
    "bedrock",
    "zhipu",
    "spark",
    "gemini",
    "ollama",
]
"""Whose words there are."""

TEMPORARY = frozenset({408, 409, 429})
"""Statuses below 500 that the official SDKs of OpenAI and Anthropic try again."""
PERMANENT = frozenset({501, 505})
"""Statuses from 500 up that say what the server cannot do: tomorrow, too."""

CALLERS_FAULT = frozenset(
    {
        *("invalid_request_error", "invalid_prompt", "context_length_exceeded", "content_filter"),
        *("authentication_error", "invalid_api_key", "permission_error", "not_found_error"),
        *("model_not_found", "request_too_large"),
    }
)
"""Words of an error event inside a 200, which has no status that says so."""


class Verdict(Enum):
    """What a failure says of another try."""

    PASS = "pass"  # nothing of it is for us to retry
    NEVER = "never"  # it looks temporary, and its code says that waiting does not help
    AGAIN = "again"
    SLOWER = "slower"  # again, but the window is longer than usual
    ONCE = "once"  # the credentials were too old: they are new by now


@dataclass(frozen=True, slots=True)
class Rules:
    """One provider's words. A word that ends in `.*` stands for all that begin so.

    `also` and `not_even` are what the configuration says; they go over the provider's.
    """

    again: frozenset[str] = frozenset()
    """Whatever the status, also 400 or 200."""
    slower: frozenset[str] = frozenset()
    once: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    """Money, allowances of a day or a month."""
    statuses: frozenset[int] = frozenset()
    """Temporary ones beside those that are for everybody."""
    within_200: re.Pattern[bytes] | None = None
    """Found in answers 200 that may be errors. None: there are none, nothing is looked at."""
    also: frozenset[str | int] = frozenset()
    not_even: frozenset[str | int] = frozenset()

    def with_own(self, also_retry: Iterable[str | int], never_retry: Iterable[str | int]) -> Rules:
        """These rules under what the configuration says: statuses (100 to 599) and codes."""
        return replace(self, also=_split(also_retry), not_even=_split(never_retry))

    def judge(self, status: int, told: Told, should_retry: str | None = None) -> Verdict:
        """Of an answer; `should_retry` is its `x-should-retry`, which goes over its status."""
        if should_retry == "false":
            return Verdict.NEVER if self._is_temporary(status) else Verdict.PASS
        verdict = self._judge_codes(told.codes)
        if status in self.not_even or verdict is Verdict.NEVER or told.is_used_up:
            return Verdict.NEVER
        if verdict is not None:
            return verdict
        if status in self.also or should_retry == "true" or self._is_temporary(status):
            return Verdict.AGAIN
        return Verdict.PASS

    def judge_event(self, code: str) -> Verdict:
        """Of an error event that came first inside a 200: temporary unless its code says no."""
        verdict = self._judge_codes((code,) if code else ())
        if verdict is None:
            return Verdict.NEVER if code in CALLERS_FAULT else Verdict.AGAIN
        return verdict

    def _judge_codes(self, codes: Sequence[str]) -> Verdict | None:
        order: tuple[tuple[frozenset[str] | frozenset[str | int], Verdict], ...] = (
            (self.not_even, Verdict.NEVER),
            (self.also, Verdict.AGAIN),
            (self.never, Verdict.NEVER),
            (self.once, Verdict.ONCE),
            (self.slower, Verdict.SLOWER),
            (self.again, Verdict.AGAIN),
        )
        for words, verdict in order:
            if words and any(_is_among(code, words) for code in codes):
                return verdict
        return None

    def _is_temporary(self, status: int) -> bool:
        if status >= 500:
            return status not in PERMANENT
        return status in TEMPORARY or status in self.statuses


def _is_among(code: str, words: frozenset[str] | frozenset[str | int]) -> bool:
    if code in words or f"{code}.*" in words:
        return True
    parts = code.split(".")
    return any(f"{'.'.join(parts[:count])}.*" in words for count in range(1, len(parts)))


def _split(words: Iterable[str | int]) -> frozenset[str | int]:
    """Statuses as numbers, codes as text: a number that is no status is a code."""
    return frozenset(
        word if isinstance(word, int) and 100 <= word <= 599 else str(word) for word in words
    )


_ANTHROPIC_MONEY = frozenset(
    {"enforced_spend_limit_reached", "contract_spend_limit_reached", "billing_error"}
)

PROVIDERS: Mapping[Provider, Rules] = {
    "none": Rules(),
    "openai": Rules(
        never=frozenset(
            {
                *("insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached"),
                *("organization_spend_limit_exceeded", "project_spend_limit_exceeded"),
                "organization_usage_limit_exceeded",
            }
        ),
    ),
    "anthropic": Rules(never=_ANTHROPIC_MONEY),
    "qianfan": Rules(
        again=frozenset({"rpm_rate_limit_exceeded", "tpm_rate_limit_exceeded"}),
        within_200=re.compile(rb'"(?:code|error)"\s*:\s*["{]'),
    ),
    "qianfan_v1": Rules(
        again=frozenset({"2", "4", "15", "18", "336100", "336501", "336502"}),
        once=frozenset({"110", "111"}),
        never=frozenset({"17", "19"}),
        within_200=re.compile(rb'"error_code"'),
    ),
    "dashscope": Rules(
        again=frozenset({"Throttling.*", "limit_requests", "InternalError", "ServiceUnavailable"}),
        slower=frozenset({"Throttling.AllocationQuota", "insufficient_quota"}),
        never=frozenset({"Arrearage"}),
        within_200=re.compile(rb'"(?:code|error)"\s*:\s*(?:"\w|\{)'),
    ),
    "hunyuan": Rules(
        again=frozenset(
            {
                *("LimitExceeded", "RequestLimitExceeded.*", "InternalError", "4000", "4001"),
                *("FailedOperation.EngineServerLimitExceeded", "FailedOperation.EngineServerError"),
                *("FailedOperation.EngineRequestTimeout", "FailedOperation.ConsoleServerError"),
            }
        ),
        never=frozenset(
            {
                "ResourceInsufficient.ChargeResourceExhaust",
                *("FailedOperation.FreeResourcePackExhausted", "FailedOperation.SetPayModeExceed"),
                *("FailedOperation.ResourcePackExhausted", "FailedOperation.ServiceStopArrears"),
                *("ResourceUnavailable.InArrears", "ResourceUnavailable.LowBalance"),
            }
        ),
        within_200=re.compile(rb'"Error(?:Msg)?"\s*:\s*\{'),
    ),
    "hunyuan_openai": Rules(again=frozenset({"2003"})),
    "ark": Rules(
        again=frozenset(
            {
                *("RateLimitExceeded.*", "ServerOverloaded"),
                *("ModelAccountRpmRateLimitExceeded", "ModelAccountTpmRateLimitExceeded"),
            }
        ),
        never=frozenset({"QuotaExceeded", "SetLimitExceeded", "AccountOverdueError"}),
    ),
    # Claude on bedrock-mantle speaks Anthropic's words.
    "bedrock": Rules(
        never=_ANTHROPIC_MONEY | {"ServiceQuotaExceededException"}, statuses=frozenset({424})
    ),
    "zhipu": Rules(
        again=frozenset({"1302", "1303", "1305", "1312"}),
        never=frozenset({"1113", "1304", "1308", "1309", "1310", "1311", "1313"}),
    ),
    "spark": Rules(
        again=frozenset({"10007", "10008", "10110", "11202", "11203"}),
        never=frozenset({"11200", "11201"}),
        within_200=re.compile(rb'"error"\s*:\s*\{|"code"\s*:\s*"?-?[1-9]'),
    ),
    "gemini": Rules(),  # what counts stands in the details: `Told.is_used_up`, `Told.delay_s`
    "ollama": Rules(),
}
"""Sources: error pages of OpenAI, Anthropic, Baidu AI Cloud, Alibaba Cloud Model Studio, Tencent
Cloud Hunyuan, Volcengine Ark, Amazon Bedrock, Zhipu, iFlytek Spark, Gemini API and Ollama; what is
an error within a 200, and what Qianfan v1 and Tencent try again, is in their official SDKs."""

HOSTS: tuple[tuple[str, Provider], ...] = (
    ("*.openai.com", "openai"),
    ("*.openai.azure.com", "openai"),
    ("*.services.ai.azure.com", "openai"),
    ("*.anthropic.com", "anthropic"),
    ("qianfan.*baidubce.com", "qianfan"),
    ("aip.baidubce.com", "qianfan_v1"),
    ("dashscope*.aliyuncs.com", "dashscope"),
    ("*.maas.aliyuncs.com", "dashscope"),
    ("hunyuan.*tencentcloudapi.com", "hunyuan"),
    ("*hunyuan.cloud.tencent.com", "hunyuan_openai"),
    ("ark.*.volces.com", "ark"),
    ("ark.*.bytepluses.com", "ark"),
    ("bedrock*.amazonaws.com", "bedrock"),
    ("bedrock-mantle.*.api.aws", "bedrock"),
    ("open.bigmodel.cn", "zhipu"),
    ("api.z.ai", "zhipu"),
    ("*.xf-yun.com", "spark"),
    ("generativelanguage.googleapis.com", "gemini"),
)
"""Patterns of the providers' own hosts; a proxy in between has another."""


def provider_of(host: str, dialect: str) -> Provider:
    """Whose words an upstream speaks: by its host (with or without a port), else by its dialect."""
    name = host.lower().partition(":")[0]
    for pattern, provider in HOSTS:
        if fnmatchcase(name, pattern):
            return provider
    if dialect == "qianfan":  # its first version, whose words the second one does not share
        return "qianfan_v1"
    return next((each for each in PROVIDERS if each == dialect), "none")
