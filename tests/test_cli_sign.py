"""`sidecar sign`: one request as JSON in, what signs it and how out. Every vector passes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from click.testing import CliRunner, Result

from filters.signers import SCHEMES, find
from filters.signers.vector import EXCHANGES
from sidecar.cli import main
from tests.support.vectors import all_vectors

TENCENT: dict[str, Any] = {
    "scheme": "TC3-HMAC-SHA256",
    "credentials": {"secret_id": "AKIDsecretid", "secret_key": "secret-canary-key", "token": None},
    "clock": {"iso": "2024-07-01T08:00:00Z", "unix": 1719820800},
    "options": {"service": "hunyuan", "action": "ChatCompletions", "version": "2023-09-01"},
    "request": {
        "method": "POST",
        "url": "https://hunyuan.tencentcloudapi.com/",
        "headers": [["Content-Type", "application/json"]],
        "body": "{}",
    },
}
BEARER: dict[str, Any] = {
    "scheme": "bearer",
    "credentials": {"key": "sk-canary"},
    "request": {"method": "GET", "url": "https://a.test/v1?b"},
}


def run(vector: Any, **more: Any) -> Result:
    text = vector if isinstance(vector, str) else json.dumps(vector)
    return CliRunner().invoke(main, ["sign"], input=text, **more)


def signed(vector: Any, **more: Any) -> Any:
    result = run(vector, **more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def changed(vector: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**vector, **changes}


def at_path(scheme: str, path: str) -> dict[str, Any]:
    vector = next(each for each in all_vectors() if each["scheme"] == scheme)
    return changed(vector, request={"method": "GET", "url": f"https://a.test{path}"})


@pytest.mark.parametrize("vector", all_vectors(), ids=lambda vector: vector["id"])
def test_every_vector_comes_out_as_the_provider_has_it(vector: dict[str, Any]) -> None:
    found, expected = signed(vector), vector["expected"]
    if vector["scheme"] == "aws-eventstream-frame":
        assert found == expected
        return
    assert found["headers"] == expected.get("headers", {})
    for step, text in expected.get("intermediate", {}).items():
        assert found["intermediate"][step] == text
    assert found["url"] == expected.get("url", vector["request"]["url"])
    if "query" in expected:
        assert dict(parse_qsl(urlsplit(found["url"]).query)) == expected["query"]


def test_there_are_vectors_of_every_scheme_that_looks_at_the_request() -> None:
    with_vectors = {vector["scheme"] for vector in all_vectors()}
    plain = ("query", "x-goog-api-key")  # keys in the query, which these two replace
    schemes = {name: find(name) for name in SCHEMES if name not in plain}
    signing = {name for name, each in schemes.items() if not (each.is_fixed or each.exchange)}
    assert signing == with_vectors - {"aws-eventstream-frame"}


def test_as_a_process_it_reads_standard_input_and_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "sign"],
        input=json.dumps(TENCENT).encode(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    found = json.loads(done.stdout)
    assert set(found) == {"headers", "url", "intermediate"}
    assert found["headers"]["Authorization"].startswith("TC3-HMAC-SHA256 Credential=AKIDsecretid/")
    assert done.stderr == b""


def test_without_a_clock_it_signs_for_now() -> None:
    vector = {name: value for name, value in TENCENT.items() if name != "clock"}
    before = int(time.time())
    found = signed(vector)
    assert before <= int(found["headers"]["X-TC-Timestamp"]) <= time.time()


@pytest.mark.parametrize(
    "clock", [{"unix": 1719820800}, {"unix_ms": 1719820800000}, {"iso": "2024-07-01T08:00:00Z"}]
)
def test_clock_is_read_in_each_form(clock: dict[str, Any]) -> None:
    assert signed(changed(TENCENT, clock=clock))["headers"]["X-TC-Timestamp"] == "1719820800"


def test_without_a_nonce_each_signature_has_its_own() -> None:
    vector = next(each for each in all_vectors() if each["scheme"] == "ACS3-HMAC-SHA256")
    vector = changed(vector, nonce=None)
    nonces = {signed(vector)["headers"]["x-acs-signature-nonce"] for _ in range(3)}
    assert len(nonces) == 3


def test_credentials_may_be_references(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-canary-key\n")
    credentials = {"secret_id": "env:ID", "secret_key": f"file:{tmp_path / 'key'}"}
    found = signed(changed(TENCENT, credentials=credentials), env={"ID": "AKIDsecretid"})
    assert found == signed(TENCENT)


def test_callers_own_authorization_is_no_part_of_it() -> None:
    request = TENCENT["request"]
    headers = [*request["headers"], ["authorization", "Bearer client"], ["X-TC-Token", "stale"]]
    assert signed(changed(TENCENT, request={**request, "headers": headers})) == signed(TENCENT)


@pytest.mark.parametrize("scheme", ["bce-auth-v1", "volcengine-HMAC-SHA256", "ACS3-HMAC-SHA256"])
def test_encoded_slash_is_signed_as_a_slash(scheme: str) -> None:
    found = signed(at_path(scheme, "/a%2Fb/c"))
    assert found["intermediate"]["canonical_request"].split("\n")[1] == "/a/b/c"
    assert found["url"] == "https://a.test/a%2Fb/c"


def test_encoded_slash_is_encoded_once_more_for_aws() -> None:
    found = signed(at_path("AWS4-HMAC-SHA256", "/a%2Fb/c"))
    assert found["intermediate"]["canonical_request"].split("\n")[1] == "/a%252Fb/c"


@pytest.mark.parametrize(
    ("listed", "names"),
    [("all", "host;x-bce-date"), (None, ""), (["x-b", "Host"], "host;x-b")],
)
def test_list_of_bce_is_written_as_given(listed: Any, names: str) -> None:
    vector = at_path("bce-auth-v1", "/")
    vector = changed(vector, options={"signed_headers": listed})
    vector["credentials"] = {**vector["credentials"], "security_token": None}
    assert signed(vector)["headers"]["Authorization"].split("/")[4] == names


def test_content_type_that_volcengine_s_sdks_send_is_told() -> None:
    vector = next(each for each in all_vectors() if each["id"] == "volc-03-ark-getapikey")
    request = {**vector["request"], "headers": []}
    for method in ("POST", "GET"):
        headers = signed(changed(vector, request={**request, "method": method}))["headers"]
        has_type = method == "POST"
        assert ("Content-Type" in headers) == has_type
        assert ("SignedHeaders=content-type;host;" in headers["Authorization"]) == has_type


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://a.test:443/", "a.test"),
        ("https://a.test:80/", "a.test:80"),
        ("http://a.test:80/", "a.test"),
        ("http://a.test:443/", "a.test:443"),
    ],
)
def test_port_is_signed_for_aws_unless_it_is_the_default_of_the_url_s_scheme(
    url: str, host: str
) -> None:
    vector = next(each for each in all_vectors() if each["scheme"] == "AWS4-HMAC-SHA256")
    found = signed(changed(vector, request={"method": "GET", "url": url}))
    assert f"host:{host}" in found["intermediate"]["canonical_request"].split("\n")


def test_null_and_empty_are_as_if_they_were_not_there() -> None:
    credentials = {**TENCENT["credentials"], "token": ""}
    options = {**TENCENT["options"], "signed_headers": None, "unsigned_payload": None}
    changes = {"credentials": credentials, "options": options, "nonce": None}
    assert signed(changed(TENCENT, **changes)) == signed(TENCENT)


@pytest.mark.parametrize("place", ["method", "headers", "body"])
def test_half_a_character_anywhere_is_refused(place: str) -> None:
    half = "A\ud83d"
    value: Any = [["content-type", half]] if place == "headers" else half
    request = {**TENCENT["request"], place: value}
    result = run(changed(TENCENT, request=request))
    assert result.exit_code == 2
    assert "surrogate" in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ("", "standard input is not JSON"),
        ("[]", "expected a JSON object"),
        ({}, "scheme: is missing"),
        (changed(TENCENT, scheme="TC3-HMAC"), 'did you mean "TC3-HMAC-SHA256"?'),
        (changed(TENCENT, scheme="nonsense"), 'scheme: expected "bearer"'),
        (changed(TENCENT, credentials=None), "credentials: is missing"),
        (changed(TENCENT, credentials={"secret_id": "a"}), "credentials.secret_key: is missing"),
        (changed(BEARER, credentials={"kee": "b", "key": "a"}), "credentials.kee: unknown"),
        (changed(BEARER, credentials={"key": "a\nb"}), "credentials.key"),
        (changed(BEARER, credentials={"key": "exec:date"}), "never runs"),
        (changed(BEARER, credentials={"key": "env:NOT_THERE"}), "NOT_THERE is not set"),
        (changed(BEARER, options={"name": "x"}), "options.name: unknown"),
        (changed(TENCENT, clock={"iso": "yesterday"}), "clock: write"),
        (changed(TENCENT, clock=7), "clock: write"),
        (changed(TENCENT, clock={"unix": 1e12}), "clock: write"),
        (changed(TENCENT, clock={"unix_ms": 10**400}), "clock: write"),
        (
            '{"scheme": "bearer", "credentials": {"key": "a"}, "clock": {"unix": NaN}, '
            '"request": {"method": "GET", "url": "https://a.test/"}}',
            "clock: write",
        ),
        (changed(TENCENT, nonce=7), "nonce: write it as text"),
        (changed(BEARER, request={"method": "GET", "url": "/v1"}), "request.url"),
        (changed(BEARER, request={"method": "GET", "url": "https://u:p@a.test/"}), "request.url"),
        (changed(BEARER, request={"method": "GET", "url": "https://a.test/测"}), "percent-encode"),
        (changed(BEARER, request={"url": "https://a.test/"}), "request.method: is missing"),
        (
            changed(BEARER, request={**BEARER["request"], "headers": [["a"]]}),
            "request.headers: write a list",
        ),
        (
            changed(BEARER, request={**BEARER["request"], "headers": {"a": "b"}}),
            "request.headers: write a list",
        ),
        (changed(BEARER, credentials={"key": None}), "credentials.key: is missing"),
        (changed(BEARER, request={**BEARER["request"], "body": {}}), "request.body"),
        (changed(BEARER, scheme="baidu-oauth"), "token that has to be fetched"),
        (changed(BEARER, sheme="bearer"), 'sheme: unknown key, did you mean "scheme"?'),
        (
            changed(BEARER, request={**BEARER["request"], "boddy": "a"}),
            'request.boddy: unknown key, did you mean "body"?',
        ),
        (
            changed(TENCENT, options={**TENCENT["options"], "acton": "a"}),
            'options.acton: unknown key, did you mean "action"?',
        ),
        (
            changed(BEARER, credentials={"key": "env:NOT_THERE"}),
            "credentials.key: the environment variable NOT_THERE is not set\n",
        ),
        (
            changed(BEARER, credentials={"key": "file:/nowhere"}),
            "credentials.key: there is no file",
        ),
        (changed(BEARER, scheme="bce-bearer"), "signed by the scheme bce-auth-v1"),
        (changed(BEARER, scheme="volcengine-ark"), 'volcengine-HMAC-SHA256 with the service "ark"'),
        (changed(TENCENT, scheme="tc3-hmac-sha256"), 'did you mean "TC3-HMAC-SHA256"?'),
        (changed(TENCENT, scheme="sigv4"), 'scheme: is called "AWS4-HMAC-SHA256" here'),
        (
            {"scheme": "aws-eventstream-frame", "frame": "00"},
            'frame: unknown key, did you mean "fra',
        ),
        ({"scheme": "aws-eventstream-frame"}, "frame_hex: write the bytes"),
        ({"scheme": "aws-eventstream-frame", "frame_hex": "00" * 16}, "frame_hex: a message"),
    ],
)
def test_input_that_is_wrong_is_explained_and_no_credential_is_shown(
    vector: Any, message: str
) -> None:
    result = run(vector, env={"NOT_THERE": None})
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "canary" not in result.stderr
    assert "Value error" not in result.stderr
    assert "Traceback" not in result.output


def test_request_that_lacks_what_the_scheme_signs_exits_1_with_the_fix() -> None:
    result = run(changed(TENCENT, options={"service": "hunyuan", "version": "2023-09-01"}))
    assert result.exit_code == 1
    assert "action" in result.stderr


def test_every_scheme_with_tokens_says_what_can_be_looked_at_instead() -> None:
    assert set(EXCHANGES) == {name for name in SCHEMES if find(name).exchange is not None}


def test_mistakes_are_all_told_each_on_a_line_of_its_own() -> None:
    result = run({"scheme": "bearer", "credentials": {}, "request": {"url": "https://a.test/"}})
    assert result.stderr.splitlines() == [
        "request.method: is missing: add it",
        "credentials.key: is missing: add it, as env:NAME or file:PATH",
    ]


# With the settings of an upstream

CONFIG = """\
upstreams:
  hunyuan:
    dialect: openai
    base_url: https://hunyuan.tencentcloudapi.com
    sign:
      scheme: TC3-HMAC-SHA256
      service: hunyuan
      action: ChatCompletions
      version: "2023-09-01"
      pool:
        - {secret_id: env:ID, secret_key: env:KEY}
        - {secret_id: env:KEY, secret_key: env:ID}
  qianfan:
    dialect: openai
    base_url: https://qianfan.baidubce.com/v2
    sign: {scheme: bce-bearer, access_key_id: env:ID, secret_access_key: env:KEY}
  local: {dialect: openai, base_url: "http://127.0.0.1:1/v1"}
"""
ENVIRON = {"ID": "AKIDsecretid", "KEY": "secret-canary-key"}


def run_by_settings(folder: Path, upstream: str, vector: Any, config: str = CONFIG) -> Result:
    path = folder / "config.yaml"
    path.write_text(config)
    arguments = ["sign", "--config", str(path), "--upstream", upstream]
    return CliRunner().invoke(main, arguments, input=json.dumps(vector), env=ENVIRON)


def test_scheme_options_and_first_key_come_from_an_upstream(tmp_path: Path) -> None:
    vector = {name: TENCENT[name] for name in ("request", "clock")}
    result = run_by_settings(tmp_path, "hunyuan", vector)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == signed(TENCENT)


@pytest.mark.parametrize(
    ("upstream", "vector", "message"),
    [
        ("hunyan", {}, 'there is no upstream "hunyan", did you mean "hunyuan"?'),
        ("local", {}, 'the upstream "local" has no section `sign`: nothing is signed'),
        ("hunyuan", {}, "request: is missing"),
        ("hunyuan", TENCENT, "`scheme` comes from the configuration: take it out"),
        ("hunyuan", [], "expected a JSON object"),
        ("qianfan", {"request": TENCENT["request"]}, "signed by the scheme bce-auth-v1"),
    ],
)
def test_upstream_that_does_not_sign_and_input_that_does_not_fit_exit_2(
    tmp_path: Path, upstream: str, vector: Any, message: str
) -> None:
    result = run_by_settings(tmp_path, upstream, vector)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "canary" not in result.output


def test_configuration_that_does_not_load_is_told_as_check_does(tmp_path: Path) -> None:
    config = CONFIG.replace("action:", "acton:")
    result = run_by_settings(tmp_path, "hunyuan", {"request": TENCENT["request"]}, config)
    assert result.exit_code == 2
    assert result.stderr == (
        f"{tmp_path}/config.yaml:8:7: upstreams.hunyuan.sign.acton: unknown key, "
        'did you mean "action"?\n'
    )


@pytest.mark.parametrize("arguments", [["--upstream", "a"], ["--config", __file__]])
def test_configuration_and_upstream_go_together(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["sign", *arguments], input="{}")
    assert result.exit_code == 2
    assert "--config and --upstream go together" in result.stderr
