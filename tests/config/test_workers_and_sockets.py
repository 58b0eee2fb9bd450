"""Several workers need a port that they can share."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.config import bind, load_config
from sidecar.errors import ConfigError


def test_several_workers_on_a_unix_socket_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "listen: unix:/run/llm.sock\n"
        "workers: 2\n"
        'upstreams: {mock: {dialect: openai, base_url: "mock:"}}\n'
        "chains: {default: {call: [], attempt: []}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        bind(load_config(path))
    assert [f"{each.line}:{each.column} {each.path}" for each in caught.value.problems] == [
        "2:10 workers"
    ]
