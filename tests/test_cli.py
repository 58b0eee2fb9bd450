"""The command line: exit codes, messages, overrides."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner, Result

from sidecar.cli import main
from tests.support.process import finished, serving, started, write_config

WRONG = """\
listen: here
upstreams:
  openai: {dialect: openai, base_urll: "mock:"}
models:
  gpt: [opanai]
"""


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    return path


# check


def test_check_of_a_good_file_exits_0_and_says_what_it_holds(tmp_path: Path) -> None:
    result = invoke("check", write_config(tmp_path))
    assert result.exit_code == 0
    assert result.stdout.endswith("config.yaml: ok (2 upstreams, 2 models, 0 teams)\n")


def test_check_names_every_mistake_with_file_line_and_column_and_exits_1(wrong: Path) -> None:
    result = invoke("check", wrong)
    assert result.exit_code == 1
    first, second, count = result.stderr.splitlines()
    assert first.startswith(f"{wrong}:1:9: listen: write ")
    assert second.startswith(f"{wrong}:3:11: upstreams.openai.base_url: is missing")
    assert count == "2 problems"
    assert result.stdout == ""


def test_check_of_a_file_that_cannot_be_read_exits_2(tmp_path: Path) -> None:
    result = invoke("check", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert result.stderr == f"{tmp_path}/none.yaml: No such file or directory\n"
    assert invoke("check", tmp_path).exit_code == 2  # a directory


def test_check_prints_warnings_and_still_exits_0(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("gpt: [openai]", "gpt: [openai, openai]"))
    result = invoke("check", path)
    assert result.exit_code == 0
    assert re.match(r"warning: \S+config.yaml:6:\d+: models.gpt: ", result.stderr)


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_file_may_be_named_either_way_but_not_both(wrong: Path, command: str) -> None:
    alone, option = invoke(command, wrong), invoke(command, "--config", wrong)
    assert (alone.exit_code, alone.stderr) == (option.exit_code, option.stderr)
    assert f"{wrong}:1:9: listen: write " in alone.stderr
    both = invoke(command, wrong, "--config", wrong)
    assert both.exit_code == 2
    assert "FILE and --config name the same thing" in both.stderr


@pytest.mark.parametrize("command", ["check", "run"])
def test_without_a_word_the_file_is_config_yaml(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(command)
    assert result.exit_code == 2
    assert result.stderr.startswith("config.yaml: ")
    assert result.stderr.endswith("No such file or directory\n")


# run


def test_run_with_a_wrong_file_exits_2_with_the_lines_of_check(wrong: Path) -> None:
    checked = invoke("check", wrong)
    ran = invoke("run", "--config", wrong)
    assert ran.exit_code == 2
    assert ran.stderr.splitlines() == checked.stderr.splitlines()[:-1]


def test_run_without_its_file_exits_2(tmp_path: Path) -> None:
    result = invoke("run", "--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--listen", "8080"),
        ("--listen", "127.0.0.1:99999"),
        ("--listen", "unix:relative.sock"),
        ("--admin", "nowhere"),
        ("--workers", "0"),
        ("--workers", "many"),
    ],
)
def test_run_with_a_wrong_option_exits_2_and_names_it(
    tmp_path: Path, option: str, value: str
) -> None:
    result = invoke("run", "--config", write_config(tmp_path), option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--listen", "--admin"])
async def test_run_on_a_port_in_use_exits_1_with_one_clear_line(
    tmp_path: Path, option: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = await finished("run", "--config", str(write_config(tmp_path)), option, address)
    assert result.code == 1
    assert result.err == (
        f"sidecar could not start: could not listen on {address}: Address already in use"
    )
    assert result.out == ""


async def test_options_win_over_the_file_and_admin_none_opens_no_admin_port(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.sock"
    config = write_config(tmp_path)
    async with serving(config, "--listen", f"unix:{path}", "--admin", "none") as sidecar:
        assert sidecar.output[0] == f"sidecar listens on unix:{path}"
        assert path.is_socket()
        assert await sidecar.end() == 0


@pytest.mark.parametrize("command", ["run", "check", "sign", "mock"])
def test_help_lists_the_exit_codes(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert re.search(r"Exit codes\n +0 +\w+", result.stdout)


def test_help_names_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert {"run", "check", "sign", "mock"} <= set(result.stdout.split())


async def test_python_m_sidecar_is_the_command(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    result = await finished("check", str(config))
    assert (result.code, result.out + "\n") == (0, invoke("check", config).stdout)


# mock


async def test_mock_says_where_it_listens_and_answers_until_sigterm(
    tmp_path: Path,
) -> None:
    async with started("mock", "--listen", "127.0.0.1:0") as mock:
        (line,) = await mock.lines_with("mock provider listens on ")
        address = line.rpartition(" ")[2]
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"http://{address}/v1/chat/completions",
                json={"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
            ) as answer,
        ):
            assert answer.status == 200
            assert (await answer.json())["object"] == "chat.completion"
        assert await mock.end(signal.SIGTERM) == 0


async def test_mock_follows_its_script_on_a_unix_socket(tmp_path: Path) -> None:
    path, script = tmp_path / "mock.sock", tmp_path / "script.yaml"
    script.write_text("- {status: 503}\n")
    async with started("mock", "--listen", f"unix:{path}", "--script", str(script)) as mock:
        await mock.lines_with(f"mock provider listens on unix:{path}")
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 15\r\n\r\n{"model": "m" }'
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        writer.close()
        assert await mock.end(signal.SIGINT) == 0
    assert not path.exists()


@pytest.mark.parametrize("listen", ["8081", "127.0.0.1:99999", "unix:relative", "unix:"])
def test_mock_with_a_wrong_address_exits_2(listen: str) -> None:
    result = invoke("mock", "--listen", listen)
    assert result.exit_code == 2
    assert "--listen" in result.stderr


def test_mock_with_a_wrong_script_exits_2_and_says_why(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("- {statuss: 503}\n")
    result = invoke("mock", "--script", script)
    assert result.exit_code == 2
    assert "statuss" in result.stderr


def test_mock_on_a_port_in_use_exits_1_with_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = invoke("mock", "--listen", address)
    assert result.exit_code == 1
    assert result.stderr == f"could not listen on {address}: Address already in use\n"
