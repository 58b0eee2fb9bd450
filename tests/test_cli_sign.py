"""`sidecar sign`: one request as JSON in, what signs it and how out. Every vector passes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
from click.testing import CliRunner, Result

from filters.signers import SCHEMES, find
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


@pytest.mark.parametrize("vector", all_vectors(), ids=lambda vector: vector["id"])
def test_every_vector_comes_out_as_the_provider_has_it(vector: dict[str, Any]) -> None:
    found, expected = signed(vector), vector["expected"]
    if vector["scheme"] == "aws-eventstream-frame":
        assert found == expected
        return
    assert found["headers"] == expected.get("headers", {})
    for step, text in expected.get("intermediate", {}).items():
        assert found["intermediate"][step] == text
    if "url" in expected:
        assert parse_qs(urlsplit(found["url"]).query) == parse_qs(urlsplit(expected["url"]).query)
        assert dict(parse_qsl(urlsplit(found["url"]).query)) == expected["query"]
    else:
        assert found["url"] == vector["request"]["url"]


def test_there_are_vectors_of_every_scheme_that_looks_at_the_request() -> None:
    with_vectors = {vector["scheme"] for vector in all_vectors()}
    schemes = {name: find(name) for name in SCHEMES if name != "query"}
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


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ("", "standard input is not JSON"),
        ("[]", "expected a JSON object"),
        ({}, "scheme: is missing"),
        (changed(TENCENT, scheme="TC3-HMAC"), 'scheme: there is no "TC3-HMAC", did you mean'),
        (changed(TENCENT, scheme="nonsense"), "known are: bearer"),
        (changed(TENCENT, credentials=None), "credentials: is missing"),
        (changed(TENCENT, credentials={"secret_id": "a"}), "credentials.secret_key: is missing"),
        (changed(BEARER, credentials={"kee": "b", "key": "a"}), "credentials.kee: unknown"),
        (changed(BEARER, credentials={"key": "a\nb"}), "credentials.key"),
        (changed(BEARER, credentials={"key": "exec:date"}), "never runs"),
        (changed(BEARER, credentials={"key": "env:NOT_THERE"}), "NOT_THERE is not set"),
        (changed(BEARER, options={"name": "x"}), "options.name: unknown"),
        (changed(TENCENT, clock={"iso": "yesterday"}), "clock: write"),
        (changed(TENCENT, clock=7), "clock: write"),
        (changed(BEARER, request={"method": "GET", "url": "/v1"}), "request.url"),
        (changed(BEARER, request={"method": "GET", "url": "https://u:p@a.test/"}), "request.url"),
        (changed(BEARER, request={"method": "GET", "url": "https://a.test/测"}), "percent-encode"),
        (changed(BEARER, request={"url": "https://a.test/"}), "request.method: is missing"),
        (
            changed(BEARER, request={**BEARER["request"], "headers": [["a"]]}),
            "request.headers: write a list",
        ),
        (changed(BEARER, request={**BEARER["request"], "body": {}}), "request.body"),
        (changed(BEARER, scheme="baidu-oauth"), "token that has to be fetched"),
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
    assert "Traceback" not in result.output


def test_request_that_lacks_what_the_scheme_signs_exits_1_with_the_fix() -> None:
    result = run(changed(TENCENT, options={"service": "hunyuan", "version": "2023-09-01"}))
    assert result.exit_code == 1
    assert "action" in result.stderr
