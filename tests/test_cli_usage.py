"""`sidecar usage`: what it prints, beside a running sidecar and without one, and its exit codes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner, Result

from filters.stores.disk_ledger import NAME, SCHEMA, DiskLedger
from filters.stores.ledger import Record
from filters.stores.redis import Redis, Script
from filters.stores.redis_ledger import RedisLedger
from filters.stores.sqlite import Database
from sidecar.api import Secret, Usage
from sidecar.cli import main
from sidecar.metrics import Metrics
from tests.support.ledger import cached, record
from tests.support.process import PATIENCE_S, serving, write_config
from tests.support.valkey import Valkey

CHAIN = "chains: {default: {call: [ledger, token_counter], attempt: [sign]}}\n"
ON_DISK = f"data_dir: state\n{CHAIN}"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["usage", *(str(each) for each in arguments)])


def asked(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """What it prints as JSON; money as `Decimal`."""
    result = invoke("--config", path, "--format", "json", *arguments)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout, parse_float=Decimal)
    return found


async def written(folder: Path, records: Sequence[Record], extra: str = ON_DISK) -> Path:
    """A configuration whose ledger holds `records`."""
    database = Database(folder / "state" / NAME, SCHEMA)
    await DiskLedger(database).write(records, 90)
    await database.close()
    return write_config(folder, extra)


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Three calls of `gpt`, one of them cached, of some days."""
    now_s = time.time()
    records = [
        record(time_s=now_s, cost="0.00000615"),
        record(time_s=now_s - 7200, cost="0.00000615"),
        cached(time_s=now_s),
        record(time_s=now_s - 3 * 86_400, team="ads", model="claude", cost=None),
    ]
    return await written(tmp_path, records)


# What it prints


def test_json_has_exactly_the_promised_keys_with_exact_money(path: Path) -> None:
    result = invoke("--config", path, "--by", "model", "--since", "1d", "--format", "json")
    assert result.stdout == (
        '[{"model": "gpt", "calls": 3, "cached_calls": 1, "input_tokens": 30, '
        '"output_tokens": 36, "cost": 0.0000123, "currency": "USD"}]\n'
    )
    assert result.exit_code == 0


def test_without_a_word_it_is_a_table_by_team_and_model_of_a_day(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    result = invoke()
    assert result.exit_code == 0
    head, _, row, _, total = result.stdout.splitlines()
    assert head.split()[:2] == ["team", "model"]
    assert row.split() == ["search", "gpt", "3", "1", "30", "36", "0.0000123", "USD"]
    assert total.split() == ["total", "3", "1", "30", "36", "0.0000123", "USD"]


def test_csv_is_the_same_with_a_head(path: Path) -> None:
    result = invoke("--config", path, "--format", "csv", "--since", "7d", "--by", "team,cached")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["team"], row["cached"], row["calls"], row["cost"]) for row in rows] == [
        ("search", "", "2", "0.0000123"),
        ("search", "hit", "1", "0"),
        ("ads", "", "1", ""),
    ]


def test_calls_of_unknown_price_are_never_mixed_into_known_ones(path: Path) -> None:
    rows = asked(path, "--by", "endpoint", "--since", "7d")
    assert [(row["calls"], row["cost"], row["currency"]) for row in rows] == [
        (3, Decimal("0.0000123"), "USD"),
        (1, None, None),
    ]


def test_since_until_team_and_model_say_which_calls(path: Path) -> None:
    def calls(*arguments: str) -> int:
        return sum(row["calls"] for row in asked(path, "--by", "team", *arguments))

    assert calls("--since", "1h") == 2
    assert calls("--since", "7d") == 4
    assert calls("--since", "7d", "--until", "1h") == 2
    assert calls("--since", "2000-01-01", "--until", "2001-01-01T12:00") == 0
    assert calls("--since", "7d", "--team", "ads") == 1
    assert calls("--since", "7d", "--model", "gpt", "--team", "ads") == 0


def test_details_tell_all_that_is_known(path: Path) -> None:
    (row,) = asked(path, "--by", "team", "--details")
    assert (row["saved_input_tokens"], row["saved_output_tokens"]) == (10, 12)
    assert (row["reported_input_tokens"], row["reported_output_tokens"]) == (20, 24)
    assert len(row) == 1 + 18 + 2


def test_nothing_is_an_empty_answer_and_no_failure(path: Path) -> None:
    assert asked(path, "--team", "nobody") == []


async def test_control_characters_of_a_caller_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = await written(tmp_path, [record(time_s=time.time(), model="\x1b]0;owned\x07")])
    assert invoke("--config", path).stdout.isascii()
    assert "\x1b" not in invoke("--config", path).stdout


# Beside a running sidecar


async def test_sums_equal_the_usage_in_the_answers_while_it_runs_and_after(tmp_path: Path) -> None:
    path = write_config(tmp_path, ON_DISK)
    tokens_in = tokens_out = 0
    async with serving(path) as sidecar, aiohttp.ClientSession(sidecar.url) as session:
        for number in range(6):
            body = {
                "model": "gpt",
                "messages": [{"role": "user", "content": "word " * number}],
                "stream": number % 2 == 1,
            }
            if body["stream"]:
                body["stream_options"] = {"include_usage": True}
            async with session.post("/v1/chat/completions", json=body) as answer:
                text = await answer.text()
            events = [each.removeprefix("data: ") for each in text.strip().split("\n\n")]
            reports = [json.loads(each) for each in events if '"usage":{' in each.replace(" ", "")]
            tokens_in += reports[-1]["usage"]["prompt_tokens"]
            tokens_out += reports[-1]["usage"]["completion_tokens"]
        async with asyncio.timeout(PATIENCE_S):
            rows: list[dict[str, Any]] = []
            while not rows or rows[0]["calls"] < 6:
                await asyncio.sleep(0.01)
                rows = asked(path, "--by", "model", "--since", "1h")
        assert await sidecar.end() == 0
    expected = {
        "model": "gpt",
        "calls": 6,
        "cached_calls": 0,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "cost": None,
        "currency": None,
    }
    assert rows == [expected]
    assert asked(path, "--by", "model", "--since", "1h") == [expected]


async def test_what_was_entered_last_is_written_at_shutdown(tmp_path: Path) -> None:
    path = write_config(tmp_path, ON_DISK)
    async with serving(path) as sidecar, aiohttp.ClientSession(sidecar.url) as session:
        body = {"model": "gpt", "messages": []}
        async with session.post("/v1/chat/completions", json=body) as answer:
            await answer.read()
        assert await sidecar.end() == 0
    assert asked(path, "--by", "model")[0]["calls"] == 1


# Where it reads


async def test_it_reads_the_shared_store_where_records_go_there(tmp_path: Path) -> None:
    with Valkey() as server:
        redis = Redis(Secret(server.url), "mine", Metrics())
        await redis.run(Script("return 0"), [])
        await RedisLedger(redis).write([record(time_s=time.time(), usage=Usage(5, 6))], 90)
        await redis.close()
        store = f"store: {{url: '{server.url}', prefix: mine}}\n"
        path = write_config(tmp_path, store + ON_DISK)
        rows = await asyncio.to_thread(asked, path, "--by", "model")
    assert [(row["model"], row["input_tokens"], row["cost"]) for row in rows] == [
        ("gpt", 5, Decimal("0.0000123"))
    ]


async def test_teams_that_keep_theirs_elsewhere_are_added(tmp_path: Path) -> None:
    """`where` of a team differs: both places are read, each once."""
    extra = "data_dir: state\nteams: teams/*.yaml\n" + CHAIN
    path = await written(tmp_path, [record(time_s=time.time())], extra)
    (tmp_path / "teams").mkdir()
    for name, where in (("a", "disk"), ("b", "off"), ("c", "auto")):
        (tmp_path / "teams" / f"{name}.yaml").write_text(
            f"team: {name}\nkeys: [sha256:{name * 64}]\nfilters: {{ledger: {{where: {where}}}}}\n"
        )
    assert asked(path, "--by", "model")[0]["calls"] == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (CHAIN, "set `data_dir`, such as `data_dir: .sidecar`, or a `store`"),
        ("data_dir: state\n" + CHAIN.replace("ledger, ", ""), "add `ledger` to the list `call`"),
        (ON_DISK + "filters: {ledger: {where: 'off'}}\n", "and not `where: off`"),
        (ON_DISK, "state/ledger.db: there is no ledger yet"),
    ],
)
def test_without_records_it_exits_1_with_the_setting_and_the_fix(
    tmp_path: Path, extra: str, message: str
) -> None:
    result = invoke("--config", write_config(tmp_path, extra))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path}/config.yaml: ")
    assert message in result.stderr
    assert result.stdout == ""


SECRETS = """
data_dir: state
teams: teams/*.yaml
upstreams:
  up: {dialect: openai, base_url: "https://up.example", proxy: "env:MISSING_PROXY",
       tls: {ca_file: missing.pem}, sign: {scheme: zhipu-jwt-hs256, api_key: "env:MISSING_1"}}
  other: {dialect: openai, base_url: "https://other.example",
          sign: {scheme: bearer, key: "file:missing"}}
chains: {default: {call: [ledger, token_counter], attempt: [sign]}}
"""


async def test_it_needs_no_secret_of_the_configuration(tmp_path: Path) -> None:
    path = await written(tmp_path, [record(time_s=time.time())])
    path.write_text(SECRETS)
    (tmp_path / "teams").mkdir()
    for name in "ab":
        (tmp_path / "teams" / f"{name}.yaml").write_text(
            f"team: {name}\nkeys: ['env:MISSING_KEY_OF_{name}']\n"
        )
    assert CliRunner().invoke(main, ["check", str(path)]).exit_code == 1
    assert asked(path, "--by", "model")[0]["calls"] == 1


async def test_it_needs_the_url_of_the_store_only_where_records_are_kept_there(
    tmp_path: Path,
) -> None:
    store = "store: {url: 'env:MISSING_STORE'}\n"
    path = await written(tmp_path, [record(time_s=time.time())], store + ON_DISK)
    result = invoke("--config", path)
    assert (result.exit_code, result.stdout) == (1, "")
    message = "store: the environment variable MISSING_STORE is not set"
    assert result.stderr == f"{path}: {message}\n"
    path.write_text(path.read_text() + "filters: {ledger: {where: disk}}\n")
    assert asked(path, "--by", "model")[0]["calls"] == 1


def test_what_is_no_reference_exits_2_as_run_does(tmp_path: Path) -> None:
    path = write_config(tmp_path, ON_DISK)
    path.write_text(path.read_text() + "store: {url: 'env:MISSING NAME'}\n")
    result = invoke("--config", path)
    assert result.exit_code == 2
    assert "write env:NAME or file:PATH" in result.stderr


def test_a_configuration_that_does_not_load_exits_2_as_run_does(tmp_path: Path) -> None:
    path = write_config(tmp_path, "data_dirr: state\n")
    result = invoke("--config", path)
    assert result.exit_code == 2
    assert f"{path}:7:1: data_dirr: " in result.stderr
    result = invoke("--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert result.stderr.endswith("No such file or directory\n")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--by", "modell", '"modell" is none of team, model, '),
        ("--since", "yesterday", "write 30m, 1h, 7d"),
        ("--until", "1y", "write 30m, 1h, 7d"),
        ("--since", "2999-01-01", "it must be earlier than --until"),
        ("--until", "7d", "it must be earlier than --until"),
        ("--format", "xml", "table"),
    ],
)
def test_a_wrong_option_exits_2_and_is_named(
    path: Path, option: str, value: str, message: str
) -> None:
    result = invoke("--config", path, option, value)
    assert result.exit_code == 2
    assert option in result.stderr or "--since" in result.stderr
    assert message in result.stderr


async def test_days_are_those_of_the_machine_s_time_zone(tmp_path: Path) -> None:
    path = await written(tmp_path, [record(time_s=1_767_279_600.0)])  # 2026-01-01 15:00 UTC
    command = [sys.executable, "-m", "sidecar", "usage", "--config", str(path), "--by", "day,hour"]
    command += ["--since", "2026-01-02", "--until", "2026-01-03", "--format", "json"]
    result = await asyncio.to_thread(
        subprocess.run,
        command,
        env={"TZ": "Asia/Tokyo", "PATH": ""},
        capture_output=True,
        text=True,
    )
    (row,) = json.loads(result.stdout)
    assert (row["day"], row["hour"]) == ("2026-01-02", "2026-01-02T00:00+09:00")


def test_it_starts_without_what_it_does_not_need(path: Path) -> None:
    program = (
        "import sys\n"
        "from sidecar.cli import main\n"
        "main(['usage', '--config', sys.argv[1]], standalone_mode=False)\n"
        "print({'aiohttp', 'httptools', 'redis', 'uvloop'} & {*sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stderr == "set()\n"
