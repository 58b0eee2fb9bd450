from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from sidecar.config import redacted

if TYPE_CHECKING:
    from conftest import Place

CANARY = "canary-0123456789"


def test_no_secret_is_shown_in_any_form(place: Place) -> None:
    place.environ |= {"KEY": CANARY, "PROXY": f"http://u:{CANARY}@proxy:1"}
    place.write("key", CANARY + "2")
    loaded = place.load(
        "upstreams:\n"
        "  a:\n    dialect: openai\n    base_url: https://h\n    proxy: env:PROXY\n"
        "    sign: {scheme: bearer, key: env:KEY}\n"
        "  b: {dialect: openai, base_url: 'mock:', proxy: 'http://proxy:1'}\n"
        "chains: {default: {call: [webhook], attempt: [sign]}}\n"
        "filters: {webhook: {token: file:key}}\n"
        "teams: teams/*.yaml",
        a="team: a\nkeys: [env:KEY, 'sha256:" + "c" * 64 + "']",
    )
    shown = redacted(loaded.config, loaded.teams)
    config = shown["config"]
    assert config["upstreams"]["a"]["proxy"] == "env:PROXY"
    assert config["upstreams"]["a"]["sign"] == {"scheme": "bearer", "key": "env:KEY"}
    assert config["upstreams"]["b"]["proxy"] == "http://proxy:1"
    assert config["upstreams"]["b"]["timeouts"]["connect_s"] == 5.0
    assert config["filters"] == {"webhook": {"token": "file:key"}}
    assert shown["teams"][0]["keys"] == ["env:KEY", "sha256:cccccccc…"]
    everything = [orjson.dumps(shown).decode(), str(pickle.dumps(loaded)), repr(loaded)]
    assert not [text for text in everything if CANARY in text]


@pytest.mark.parametrize(
    ("store", "shown"),
    [
        ("memory", {"url": None, "prefix": "sidecar", "ca_file": None}),
        ("redis://h:6379/0", {"url": "redis://h:6379/0", "prefix": "sidecar", "ca_file": None}),
        ("{url: env:STORE, prefix: p}", {"url": "env:STORE", "prefix": "p", "ca_file": None}),
        ("file:store", {"url": "file:store", "prefix": "sidecar", "ca_file": None}),
    ],
)
def test_a_store_is_shown_as_it_stands_in_the_file(
    place: Place, store: str, shown: dict[str, Any]
) -> None:
    place.environ["STORE"] = f"redis://:{CANARY}@h"
    place.write("store", f"redis://:{CANARY}@h")
    loaded = place.load(f"{place.SMALLEST}store: {store}")
    config = redacted(loaded.config, ())["config"]
    assert config["store"] == shown
    everything = [orjson.dumps(config).decode(), str(pickle.dumps(loaded)), repr(loaded)]
    assert not [text for text in everything if CANARY in text]


def test_plain_text_under_the_name_of_a_secret_is_hidden(place: Place) -> None:
    loaded = place.load(
        place.SMALLEST
        + f"filters:\n  x: {{api_key: {CANARY}, max_tokens: 5, deep: [{{password: {CANARY}}}]}}\n"
    )
    assert redacted(loaded.config, ())["config"]["filters"] == {
        "x": {"api_key": "***", "max_tokens": 5, "deep": [{"password": "***"}]}
    }


def test_a_secret_without_a_reference_shows_stars(place: Place) -> None:
    from sidecar.config.secret import Secret

    loaded = place.load()
    mock = loaded.config.upstreams["mock"].model_copy(update={"proxy": Secret(CANARY)})
    config = loaded.config.model_copy(update={"upstreams": {"mock": mock}})
    assert redacted(config, ())["config"]["upstreams"]["mock"]["proxy"] == "***"
