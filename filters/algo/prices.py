"""Which tariff is a model's: the shipped table, the provider by its host, and names of models.

The table is a JSON file with one model a line. It stays bytes: what is asked for is found and read
line by line, so that two thousand models cost a quarter of a megabyte and no start-up time.
`scripts/make_prices.py` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

_HOSTS = (
    # Alibaba charges in yuan in Beijing, in dollars in Singapore.
    (r"dashscope\.aliyuncs\.com", "dashscope-cn"),
    (r"dashscope-intl\.aliyuncs\.com", "dashscope"),
    (r"api\.openai\.com", "openai"),
    (r".+\.openai\.azure\.com", "azure"),
    (r".+\.(cognitiveservices|services\.ai)\.azure\.com", "azure"),
    (r"api\.anthropic\.com", "anthropic"),
    (r"bedrock-runtime(-fips)?\.(?P<region>[a-z0-9-]+)\.amazonaws\.com", "bedrock"),
    (r"bedrock-mantle\.(?P<region>[a-z0-9-]+)\.api\.aws", "bedrock"),
    (r"generativelanguage\.googleapis\.com", "gemini"),
    (r"([a-z0-9-]+-)?aiplatform\.googleapis\.com", "vertex"),
    (r"api\.deepseek\.com", "deepseek"),
    (r"(qianfan|aip)\.baidubce\.com", "qianfan"),
    (r"ark\.[a-z0-9-]+\.volces\.com", "volcengine"),
    (r"api\.moonshot\.ai", "moonshot"),
    (r"api\.moonshot\.cn", "moonshot-cn"),
    (r"api\.z\.ai", "zai"),
    (r"open\.bigmodel\.cn", "zhipu"),
    (r"tokenhub-intl\.tencentcloudmaas\.com", "tencent"),
    (r"(api\.hunyuan\.cloud\.tencent|hunyuan\.tencentcloudapi)\.com", "hunyuan"),
    (r"api\.mistral\.ai", "mistral"),
    (r"api\.groq\.com", "groq"),
    (r"api\.x\.ai", "xai"),
    (r"api\.cerebras\.ai", "cerebras"),
    (r"api\.minimax\.io", "minimax"),
)
"""Hosts of providers, as in docs/providers.md, and the provider's name in the table."""

PROVIDERS = tuple(dict.fromkeys(name for _, name in _HOSTS))

_PATTERNS = tuple((re.compile(pattern).fullmatch, name) for pattern, name in _HOSTS)

_PORT = re.compile(r":\d+$")
_DATE = re.compile(
    r"(?P<base>.+?)(-\d{4}-\d{2}-\d{2}|[-@]\d{8}|-latest|@default|@latest)"
).fullmatch
"""A snapshot of a model, or its newest one."""
_PREFIXES = ("models/", "google/", "publishers/google/models/")
"""Of names at Google."""


def provider_of(host: str) -> tuple[str, str] | None:
    """The provider behind `host`, which may have a port, and the region that it names (or "").
    None: nobody we know, or the embedded provider."""
    name = _PORT.sub("", host.lower())
    for match, provider in _PATTERNS:
        found = match(name)
        if found:
            return provider, found.groupdict().get("region") or ""
    return None


def names_of(model: str) -> Iterator[str]:
    """The names under which a provider's price of `model` may stand, the most exact one first.

    A snapshot that has no price of its own costs what the model costs: providers say so of those
    for which they do not say otherwise. No other name is ever taken for this one.
    """
    plain = model
    for prefix in _PREFIXES:
        plain = plain.removeprefix(prefix)
    if plain.startswith("ft:"):  # ft:gpt-4o-2024-08-06:my-org::id
        plain = ":".join(plain.split(":")[:2])
    if plain != model:
        yield model
    yield plain
    found = _DATE(plain)
    if found and not plain.startswith("ft:"):
        yield found["base"]


class PriceTable:
    """The shipped prices."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def entry(self, key: str) -> Any:
        """What stands under `provider/model`: one entry, or a list by date; None: nothing."""
        name = f"\n{json.dumps(key)}:".encode()  # which escapes whatever a caller has put in
        at = self._data.find(name)
        if at < 0:
            return None
        at += len(name)
        return orjson.loads(self._data[at : self._data.index(b"\n", at)].rstrip(b","))

    def find(self, provider: str, region: str, model: str) -> Any:
        """The entry of `model` at `provider`: of its region, else of all."""
        places = (f"{provider}/{region}", provider) if region else (provider,)
        for name in names_of(model):
            for place in places:
                found = self.entry(f"{place}/{name}")
                if found is not None:
                    return found
        return None

    def about(self) -> Mapping[str, Any]:
        """Where the prices are from, and of which day."""
        found: Mapping[str, Any] = self.entry("about")
        return found
