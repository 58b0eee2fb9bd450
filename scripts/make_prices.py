"""Writes filters/data/prices.json: the shipped prices of models.

    python scripts/make_prices.py litellm-1.109.1-….whl --date 2026-11-24

Most prices come from the table in LiteLLM's wheel (MIT, outside of its enterprise folder), which is
read from the archive and never imported. Those that it does not have, or has in another currency
than is charged, stand in `prices_by_hand.yaml` beside this file. Which of their models have a price
that our classes of tokens can tell is decided here; how it is worked out is
`filters/algo/pricing.py`'s.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "filters" / "data" / "prices.json"
BY_HAND = HERE / "prices_by_hand.yaml"
MEMBER = "litellm/model_prices_and_context_window_backup.json"

SOURCES = {
    "openai": ("openai", "text-completion-openai"),
    "azure": ("azure", "azure_text", "azure_ai"),
    "anthropic": ("anthropic",),
    "bedrock": ("bedrock", "bedrock_converse", "bedrock_mantle"),
    "gemini": ("gemini",),
    "vertex": (
        *("vertex_ai", "vertex_ai-language-models", "vertex_ai-anthropic_models"),
        *("vertex_ai-mistral_models", "vertex_ai-llama_models", "vertex_ai-deepseek_models"),
        *("vertex_ai-qwen_models", "vertex_ai-openai_models", "vertex_ai-embedding-models"),
        *("vertex_ai-zai_models", "vertex_ai-moonshot_models", "vertex_ai-minimax_models"),
    ),
    "deepseek": ("deepseek",),
    "dashscope": ("dashscope",),
    "moonshot": ("moonshot",),
    "zai": ("zai",),
    "tencent": ("tencent",),
    "mistral": ("mistral",),
    "groq": ("groq",),
    "xai": ("xai",),
    "cerebras": ("cerebras",),
    "minimax": ("minimax",),
}
"""Our providers, and theirs; of two prices of one model the first counts."""

PREFIXES = (
    *("azure/", "azure_ai/", "bedrock/", "bedrock_mantle/", "gemini/", "vertex_ai/", "deepseek/"),
    *("dashscope/", "moonshot/", "zai/", "tencent/", "mistral/", "groq/", "xai/", "cerebras/"),
    "minimax/",
)
MODES = frozenset({"chat", "completion", "embedding", "responses"})

RATES = {
    "input": "input_cost_per_token",
    "cached_input": "cache_read_input_token_cost",
    "cache_write": "cache_creation_input_token_cost",
    "cache_write_1h": "cache_creation_input_token_cost_above_1hr",
    "output": "output_cost_per_token",
    "reasoning": "output_cost_per_reasoning_token",
}
WRITES = ("cache_write", "cache_write_1h")
_ABOVE = re.compile(r"(?P<rate>\w+?)_above_(?P<thousands>\d+)k_tokens").fullmatch


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="LiteLLM's wheel")
    parser.add_argument("--date", required=True, help="of today, as in 2026-11-24")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as archive:
        theirs = json.loads(archive.read(MEMBER), parse_float=Decimal)
    about: dict[str, Any] = {
        "source": f"LiteLLM {options.wheel.name.split('-')[1]}, {Path(MEMBER).name}",
        "licence": "MIT, Copyright (c) 2023 Berri AI; see NOTICE",
        "changes": "a selection, in other units",
        "date": options.date,
        "unit": "a million tokens",
    }
    own = yaml.safe_load(BY_HAND.read_text())
    about["by_hand"] = {
        provider: {
            "source": section["source"],
            "checked": str(section["checked"]),
            "verified": section["verified"],
        }
        for provider, section in own.items()
    }
    prices = {**collect(theirs), **by_hand(own)}
    options.output.write_text(text_of(about, prices))
    print(f"{len(prices)} models, {options.output.stat().st_size} bytes: {options.output}")


def collect(theirs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Our entries by `provider/model`."""
    found: dict[str, Any] = {}
    for provider, sources in SOURCES.items():
        for source in sources:
            for name, model in theirs.items():
                if model.get("litellm_provider") != source or model.get("mode") not in MODES:
                    continue
                if "month-commitment" in name:
                    continue
                entry = entry_of(model, has_modes=provider == "dashscope")
                if entry is not None:
                    if "claude" in name:
                        _price_an_hour(entry)
                    found.setdefault(f"{provider}/{own_name(name)}", entry)
    return found


def _price_an_hour(entry: dict[str, Any]) -> None:
    """What is written to Anthropic's cache for an hour costs what two inputs do (Anthropic API
    reference, prompt caching): some of their entries for other clouds leave it out."""
    for each in (entry, *entry.get("tiers", ())):
        if "cache_write" in each and "input" in each:
            each.setdefault("cache_write_1h", _decimal(2 * Decimal(each["input"])))


def own_name(name: str) -> str:
    """The model's name as its provider has it."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def entry_of(model: Mapping[str, Any], *, has_modes: bool) -> dict[str, Any] | None:
    """One entry of ours; None when the model costs something that we could not work out.

    `has_modes`: what is called the price of reasoning is the one of all output of an answer with
    reasoning, and thousands of tokens are 1,024 (its longest input, "252K", has 258,048 tokens).
    """
    if "output_cost_per_audio_token" in model:  # we do not see how much of an answer is sound
        return None
    tiers = list(_ranges(model.get("tiered_pricing") or ()))
    base = _rates(tiers.pop(0)[1] if tiers else model)
    if "input" not in base or base["input"] == "0":  # nothing is free: nobody has entered it yet
        return None
    base.setdefault("output", "0")
    if base["output"] == "0" and model.get("mode") != "embedding":
        return None
    tiers += sorted(_steps(model).items())
    if has_modes:
        tiers = [(above * 1024 // 1000, rates) for above, rates in tiers]
    entry: dict[str, Any] = base
    if tiers:
        rows = [{"above_input_tokens": above, **_rates(rates)} for above, rates in tiers]
        entry["tiers"] = [row for row in rows if len(row) > 1]
    if "input_cost_per_request" in model:
        entry["request"] = _decimal(model["input_cost_per_request"])
    if "off_peak_pricing" in model:
        entry["off_peak"] = _off_peak(model["off_peak_pricing"])
    if has_modes:
        for each in (entry, *entry.get("tiers", ())):
            if "reasoning" in each:
                each["thinking"] = each.pop("reasoning")
    elif entry.get("reasoning") == entry["output"]:
        del entry["reasoning"]
    return entry


def _ranges(rows: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Tiers that begin where the one before ends."""
    for row in sorted(rows, key=lambda each: each["range"][0]):
        yield int(row["range"][0]), row


def _steps(model: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tiers that are written as `input_cost_per_token_above_200k_tokens`."""
    steps: dict[int, dict[str, Any]] = {}
    for name, value in model.items():
        found = _ABOVE(name)
        if found and found["rate"] in RATES.values():
            steps.setdefault(int(found["thousands"]) * 1000, {})[found["rate"]] = value
    return steps


def _off_peak(value: Mapping[str, Any]) -> dict[str, Any]:
    windows = []
    for window in value["windows"]:
        hours = window["hours_utc"]
        hours = [hours] if isinstance(hours, str) else hours
        hours = [re.sub(r"-00:00$", "-24:00", each) for each in hours]
        windows.append({"hours_utc": hours, "weekdays": window["weekdays"]})
    return {**_rates(value), "windows": windows}


def _rates(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of ours from costs of one token. Nobody writes a cache for less than input costs: where
    that is said, it is another rate by mistake, and left out."""
    found = {
        ours: _per_million(row[theirs])
        for ours, theirs in RATES.items()
        if isinstance(row.get(theirs), int | Decimal)
    }
    least = Decimal(found.get("input", 0))
    return {
        name: rate
        for name, rate in found.items()
        if name not in WRITES or (rate != "0" and Decimal(rate) >= least)
    }


def _per_million(cost: Decimal | int) -> str:
    """Of one token, as a float wrote it: its last digits are noise."""
    return _decimal(round(Decimal(cost) * 1_000_000, 9))


def _decimal(value: Any) -> str:
    return f"{Decimal(value).normalize():f}"


def by_hand(providers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Entries of ours from the file beside this one, numbers as text. What a provider's entries
    have in common stands under `all`; several names, with spaces between, share an entry, and one
    model may have a list of them, by `valid_from`."""
    found: dict[str, Any] = {}
    for provider, section in providers.items():
        factors = section.get("of_input", {})
        for names, value in section["models"].items():
            several = value if isinstance(value, list) else [value]
            entries = [_own({**section["all"], **entry}, factors) for entry in several]
            for name in names.split():
                found[f"{provider}/{name}"] = entries if len(entries) > 1 else entries[0]
    return found


def _own(entry: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """One entry, or one of its tiers, with the rates that are made from the one of input."""
    made: dict[str, Any] = {}
    if "input" in entry:
        for name, factor in factors.items():
            made[name] = _decimal(Decimal(str(entry["input"])) * Decimal(str(factor)))
    for name, value in entry.items():
        if name == "tiers":
            made[name] = [_own(each, factors) for each in value]
        else:
            made[name] = value if name == "above_input_tokens" else str(value)
    return made


def text_of(about: Mapping[str, Any], prices: Mapping[str, Any]) -> str:
    """JSON with one model a line, which is how `PriceTable` finds it."""

    def line(name: str, value: Any) -> str:
        return f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}"

    lines = [line("about", about), *(line(name, prices[name]) for name in sorted(prices))]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
