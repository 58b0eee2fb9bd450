"""`upstreams.NAME.sign` as it stands in a file: what loads, what does not, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from filters.signers.settings import digest, reference
from sidecar.cli import main
from sidecar.config import Bound, bind, load_config
from sidecar.errors import ConfigError

ENVIRON = {
    "A": "secret-a-value",
    "B": "secret-b-value",
    "PADDED": " secret ",
    "EMPTY": "",
    "LINES": "secret-a\nline two",
    "UMLAUT": "secret-ä-value",
    "SPACED": "Bearer secret-a",
}
BAIDU = "scheme: baidu-oauth, client_id: env:A, client_secret: env:B"
TENCENT = 'scheme: TC3-HMAC-SHA256, service: hunyuan, version: "2023-09-01"'


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """The binding of a configuration whose upstream has this `sign` section, on line 5."""

    def load(section: str, more: str = "", base_url: str = "https://a.test") -> Bound:
        path = tmp_path / "config.yaml"
        path.write_text(
            f"upstreams:\n  up:\n    dialect: openai\n    base_url: {base_url}\n"
            f"    sign: {{{section}}}\n{more}"
        )
        return bind(load_config(path, ENVIRON), ENVIRON)

    return load


def settings_of(bound: Bound) -> Any:
    return bound.upstream_sections["sign"]["up"]


def test_one_key_stands_beside_the_scheme(load: Any) -> None:
    (key,) = settings_of(load("scheme: bearer, key: env:A")).keys
    assert key.key.reveal() == "secret-a-value"
    assert reference(key) == "env:A"


def test_several_keys_stand_in_a_pool_and_one_secret_needs_no_name(load: Any) -> None:
    settings = settings_of(load("scheme: bearer, pool: [env:A, {key: env:B}], set_aside_s: 5.0"))
    assert [key.key.reveal() for key in settings.keys] == ["secret-a-value", "secret-b-value"]
    assert settings.set_aside_s == 5.0


def test_options_of_a_pool_hold_for_all_its_keys(load: Any) -> None:
    settings = settings_of(
        load(f"{TENCENT}, pool: [{{secret_id: env:A, secret_key: env:B}}], region: ap-guangzhou")
    )
    assert (settings.service, settings.region) == ("hunyuan", "ap-guangzhou")
    assert settings.keys[0].token is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("key: env:A", "sign.scheme: is missing"),
        ("scheme: bearr, key: env:A", 'did you mean "bearer"?'),
        ("scheme: [bearer], key: env:A", "found a list"),
        ("scheme: TC3-hmac-sha256", 'did you mean "TC3-HMAC-SHA256"?'),
        ("scheme: aws4-hmac-sha256", 'did you mean "AWS4-HMAC-SHA256"?'),
        ("scheme: SigV4", 'sign.scheme: is called "AWS4-HMAC-SHA256" here'),
        ("scheme: bearer", "sign.key: is missing: add it, as env:NAME or file:PATH"),
        ("scheme: bearer, kee: env:A", 'sign.kee: unknown key, did you mean "key"?'),
        ("scheme: bearer, key: sk-plain", "write env:NAME or file:PATH"),
        ("scheme: bearer, key: exec:date", "never runs programs"),
        ("scheme: bearer, key: env:EMPTY", "is empty"),
        ("scheme: bearer, key: env:PADDED", "white space"),
        ("scheme: bearer, key: env:LINES", "sign.key: the environment variable LINES has a line"),
        ("scheme: bearer, key: env:UMLAUT", "sign.key: the key has a character that no header"),
        ("scheme: bearer, key: env:SPACED", "leave out the word Bearer"),
        ("scheme: header, key: env:UMLAUT", "sign.key: the key has a character that no header"),
        ("scheme: bearer, key: file:.", "is a directory"),
        ("scheme: bearer, key: env:A, set_aside_s: 5", "`set_aside_s` goes with `pool` alone"),
        ("scheme: bearer, pool: env:A", "expected a list, found text; write a list in brackets"),
        (f"{BAIDU}, token_url: 'http://169.254.169.254/t'", "sign.token_url: 169.254.169.254 is l"),
        (f"{BAIDU}, token_url: 'https://[fe80::1]/t'", "sign.token_url: fe80::1 is link-local"),
        (f"{BAIDU}, token_url: 'https://2852039166/t'", "169.254.169.254 is link-local"),
        (f"{BAIDU}, token_url: 'https://[::1/t'", "sign.token_url: write https://host/path"),
        ("scheme: bearer, pool: []", "needs at least 1 entry"),
        ("scheme: bearer, pool: [env:A, env:A]", "entries 1 and 2 are the same key"),
        ("scheme: bearer, pool: [env:A], key: env:B", "`key` cannot stand beside `pool`"),
        ("scheme: bearer, pool: [env:A, {}]", "sign.pool[1].key: is missing"),
        ("scheme: bearer, pool: [env:A], set_aside_s: 0", "set_aside_s"),
        (f"{TENCENT}, pool: [env:A]", "sign.pool[0]"),
        (f"{TENCENT}, secret_id: env:A", "sign.secret_key: is missing"),
        ("scheme: basic, username: 'a:b', password: env:A", "holds no colon"),
        ("scheme: header, key: env:A, name: host", "choose another header"),
        ("scheme: zhipu-jwt-hs256, api_key: env:A", "id.secret"),
    ],
)
def test_mistake_is_told_with_its_place_and_fix_and_without_a_value(
    load: Any, section: str, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(section)
    text = str(raised.value)
    assert message in text
    assert "config.yaml:5:" in text
    assert not any(value in text for value in ("secret-a", "secret-b", "sk-plain"))


def test_header_may_carry_a_space_and_basic_any_letter(load: Any) -> None:
    (key,) = settings_of(load("scheme: header, name: authorization, key: env:SPACED")).keys
    assert key.key.reveal() == ENVIRON["SPACED"]
    (key,) = settings_of(load("scheme: basic, username: me, password: env:UMLAUT")).keys
    assert key.password.reveal() == ENVIRON["UMLAUT"]


def test_key_of_ours_and_key_of_the_client_exclude_each_other(load: Any) -> None:
    with pytest.raises(ConfigError, match="sign: cannot go with `pass_client_key`: remove one"):
        load("scheme: bearer, key: env:A", "    pass_client_key: true\n")


def test_keys_are_told_apart_by_a_digest_that_is_no_key(load: Any) -> None:
    first, second = settings_of(load("scheme: bearer, pool: [env:A, env:B]")).keys
    assert digest(first) != digest(second)
    assert digest(first) == digest(settings_of(load("scheme: bearer, key: env:A")).keys[0])
    assert "secret" not in digest(first)


@pytest.mark.parametrize(
    ("section", "base_url", "notes"),
    [
        ("scheme: bearer, key: env:A", "https://a.test", []),
        ("scheme: bearer, key: env:A", "http://127.0.0.1:8000/v1", []),
        ("scheme: bearer, key: env:A", "http://localhost/v1", []),
        ("scheme: bearer, key: env:A", "http://[::1]:8000/v1", []),
        ("scheme: bearer, key: env:A", "http://a.svc/v1", ["goes over plain http"]),
        ("scheme: bearer, key: env:A", "http://127.a.test/v1", ["goes over plain http"]),
        (BAIDU, "https://a.test", []),
        (f"{BAIDU}, token_url: 'http://127.0.0.1:1/t'", "https://a.test", []),
        (f"{BAIDU}, token_url: 'http://a.svc/t'", "https://a.test", ["fetches its token over"]),
        (f"{TENCENT}, secret_id: env:A, secret_key: env:B", "https://a.test", ["signs the body"]),
        (
            f"{TENCENT}, secret_id: env:A, secret_key: env:B, unsigned_payload: true",
            "https://a.test",
            [],
        ),
    ],
)
def test_what_is_right_and_good_to_know_is_a_note(
    load: Any, section: str, base_url: str, notes: list[str]
) -> None:
    found = load(section, base_url=base_url).notes
    assert len(found) == len(notes)
    for text, note in zip(notes, found, strict=True):
        assert f"config.yaml:5:5: upstreams.up.sign: {text}" in note


def test_check_prints_the_notes_and_succeeds(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A", ENVIRON["A"])
    monkeypatch.setenv("B", ENVIRON["B"])
    load(f"{TENCENT}, secret_id: env:A, secret_key: env:B")
    result = CliRunner().invoke(main, ["check", str(tmp_path / "config.yaml")])
    assert result.exit_code == 0
    assert "note: " in result.stderr
    assert "held first, up to http.max_body_bytes" in result.stderr
