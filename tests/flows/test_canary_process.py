"""No secret shows in what a process prints, whether it serves, refuses to, or fails."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.support.canary import Canaries
from tests.support.flow import CHAT, HELLO
from tests.support.process import finished, serving

FAULTY = """
from sidecar.api import AttemptFilter, FilterConfig, Secret


class Faulty(AttemptFilter):
    class Config(FilterConfig):
        token: Secret
        when: str = "never"

    class UpstreamConfig(FilterConfig):
        token: Secret

    def __init__(self, config, kit):
        super().__init__(config, kit)
        self.fail("made")

    async def start(self):
        self.fail("started")

    async def handle(self, attempt, call_next):
        self.kit.log.warning("shown", extra={"config": self.config, "attempt": attempt})
        self.fail("called", attempt, attempt.headers, attempt.call)
        reply = await call_next(attempt)
        self.fail("answered", attempt, attempt.headers, reply)
        return reply

    def fail(self, when, *held):
        if self.config.when == when:
            raise RuntimeError(f"a bug: {self.config} {self.kit} {held}")
"""


@dataclass
class Written:
    """A configuration on disk, with its secrets in files and in the environment."""

    folder: Path
    canaries: Canaries
    monkeypatch: pytest.MonkeyPatch
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def env(self, name: str, value: str) -> str:
        """A reference to `value` in the environment that a new process gets."""
        variable = f"CANARY_{next(self.numbers)}"
        self.monkeypatch.setenv(variable, value)
        if value:
            self.canaries.add(f"{name} in the environment", value)
        return f"env:{variable}"

    def file(self, name: str, value: str) -> str:
        path = self.folder / f"secret-{next(self.numbers)}"
        path.write_bytes(value.encode("utf-8", "surrogateescape"))
        if value:
            self.canaries.add(f"{name} in a file", value)
        return f"file:{path.name}"

    def config(self, upstreams: dict[str, Any], **more: Any) -> Path:
        path = self.folder / "config.yaml"
        config = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "log": {"level": "debug"},
            "upstreams": {
                name: {"dialect": "openai", "base_url": "mock:", **settings}
                for name, settings in upstreams.items()
            },
            "models": {name: [name] for name in upstreams},
            **more,
        }
        path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return path

    def faulty(self, when: str) -> Path:
        """One upstream with a key, and a filter that knows secrets and fails at some point."""
        (self.folder / "faulty.py").write_text(FAULTY)
        key = self.env("key", self.canaries.make("raw key"))
        mine = self.file("token", self.canaries.make("raw token"))
        name = "faulty:Faulty"
        sign = {"scheme": "bearer", "key": key}
        return self.config(
            {"up": {"sign": sign, name: {"token": mine}}},
            filters={name: {"token": mine, "when": when}},
            chains={"default": {"attempt": [name, "sign"]}},
        )

    def found_in(self, *texts: str) -> set[str]:
        return {name for text in texts for name in self.canaries.found_in(text)}


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def written(tmp_path: Path, canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> Written:
    return Written(tmp_path, canaries, monkeypatch)


COMMANDS = {"check": ("check",), "run": ("run", "--config")}
CODES = {"check": 1, "run": 2}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("where", ["sign", "proxy"])  # read at two different times
async def test_a_secret_that_cannot_be_one_is_refused_and_not_shown(
    written: Written, command: str, where: str
) -> None:
    long = written.canaries.make("long")
    bad = {
        "has less than 8 characters": "wqzjkvx",
        "has white space around": f" {long} ",
        "is empty": "",
        "is not UTF-8 text": f"{long}\udcff",
    }
    upstreams: dict[str, Any] = {}
    for why, value in bad.items():
        for refer in (written.env, written.file):
            reference = refer(why, value)
            settings = {"proxy": reference, "sign": {"scheme": "bearer", "key": reference}}
            upstreams[f"up-{len(upstreams)}"] = {where: settings[where]}
    result = await finished(*COMMANDS[command], str(written.config(upstreams)))
    assert result.code == CODES[command]
    assert [result.err.count(why) for why in bad] == [2, 2, 2, 2]
    assert written.found_in(result.out, result.err) == set()


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_secret_in_the_wrong_place_is_not_shown(written: Written, command: str) -> None:
    secret = written.canaries.make("secret in the configuration")
    good = written.env("good", "a-good-secret")
    path = written.config(
        {
            "key": {"sign": {"scheme": "bearer", "key": secret}},
            "list": {"sign": {"scheme": "bearer", "pool": [secret, {"key": secret}, [secret]]}},
            "mapping": {"sign": {"scheme": "bearer", "key": {"value": secret}}},
            "scheme": {"sign": {"scheme": secret, "key": good}},
            "program": {"sign": {"scheme": "bearer", "key": f"exec:echo {secret}"}},
            "option": {"sign": {"scheme": "basic", "username": f"u:{secret}"}},
            "extra": {"sign": {"scheme": "bearer", "key": good, "secret": secret}},
            "whole": {"sign": secret},
        }
    )
    result = await finished(*COMMANDS[command], str(path))
    assert (result.code, result.err.count(".sign")) == (CODES[command], 11)
    assert written.found_in(result.out, result.err) == set()


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_secret_in_a_section_that_is_read_first_is_not_shown(
    written: Written, command: str
) -> None:
    secret = written.canaries.make("secret in the configuration")
    (written.folder / "team.yaml").write_text(f"team: a\nkeys: [{secret!r}, 5, [{secret!r}]]\n")
    path = written.config(
        {
            "proxy": {"proxy": f"http://user:{secret}@127.0.0.1:1"},
            "url": {"base_url": f"https://user:{secret}@127.0.0.1/v1"},
            "query": {"base_url": f"https://127.0.0.1/v1?key={secret}"},
            "reference": {"proxy": written.env("proxy", f"{secret} is no proxy")},
            "pass": {"pass_client_key": secret},
            "dialect": {"dialect": secret},
            "pool": {"pool": {"max_connections": secret}},
        },
        teams="team.yaml",
        listen=secret,
    )
    result = await finished(*COMMANDS[command], str(path))
    assert (result.code, result.err.count("upstreams.")) == (CODES[command], 7)
    assert result.err.count("team.yaml:2:") == 3
    assert written.found_in(result.out, result.err) == set()


@pytest.mark.parametrize("when", ["called", "answered"])
async def test_no_secret_shows_of_a_filter_that_fails_at_a_call(
    written: Written, when: str
) -> None:
    async with (
        serving(written.faulty(when)) as sidecar,
        aiohttp.ClientSession(headers={"x-api-key": written.canaries.make("client")}) as session,
    ):
        body = {"model": "up", "messages": HELLO}
        async with session.post(f"{sidecar.url}{CHAT}", json=body) as answer:
            assert answer.status == 500
            shown = [f"{answer.headers!r} {await answer.text()}"]
        async with session.get(f"{sidecar.admin_url}/config") as answer:
            shown.append(await answer.text())
            assert "env:CANARY_" in shown[-1]
        assert "a bug: " in (await sidecar.event("call_failed"))["traceback"]
        assert await sidecar.event("shown")
        await sidecar.lines_with('"outcome":"aborted"')
        assert await sidecar.end() == 0
        shown += [*sidecar.output, *map(repr, sidecar.log), *sidecar.errors]
    assert written.found_in(*shown) == set()


@pytest.mark.parametrize("when", ["made", "started"])
async def test_no_secret_shows_of_a_filter_that_keeps_it_from_starting(
    written: Written, when: str
) -> None:
    result = await finished("run", "--config", str(written.faulty(when)))
    assert result.code == 1
    assert "could not start: RuntimeError: a bug: " in result.err
    assert '"traceback": "Traceback (most recent call last)' in result.err
    assert written.found_in(result.out, result.err) == set()
