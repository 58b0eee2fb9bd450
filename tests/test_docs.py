"""What the documentation shows, works: its filters run, its configurations load."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import re
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from filters import BUILTIN
from filters.signers import SCHEMES, find
from filters.signers.settings import SET_ASIDE_S, PoolSettings, SignSettings
from filters.signers.vector import RequestVector, WholeVector
from sidecar.api import AttemptFilter, CallFilter, Filter, FilterConfig
from sidecar.config import Bound, bind, load_config
from sidecar.config.schema import Config
from tests.contract.builtin import filter_class
from tests.support.harness import Harness, Use
from tests.support.process import serving

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MANIFESTS = sorted((ROOT / "k8s").rglob("*.yaml"))

MOCK = 'upstreams: {mock: {dialect: openai, base_url: "mock:"}}\n'

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


class Block:
    """One fenced block of a page."""

    def __init__(self, page: Path, language: str, text: str, line: int) -> None:
        self.page = page
        self.language = language
        self.text = text
        self.line = line

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        indent, language, body = found.groups()
        body = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        yield Block(page, language, body, text[: found.start()].count("\n") + 1)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
YAML = [block for block in BLOCKS if block.language in ("yaml", "yml")]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def module_name(block: Block) -> str | None:
    """The module that a block says it is, by a first line such as `# limits.py`."""
    found = re.match(r"# (\w+)\.py\n", block.text)
    return found[1] if found else None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place beside a configuration, on the import path; its modules are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def write_modules(page: Path, folder: Path) -> None:
    for block in PYTHON:
        if block.page == page and (name := module_name(block)):
            (folder / f"{name}.py").write_text(block.text)
    importlib.invalidate_caches()


# Python


@pytest.mark.parametrize("block", PYTHON, ids=str)
async def test_python_block_runs(block: Block, folder: Path) -> None:
    name = module_name(block)
    if name is None:
        await runs_beside_a_sidecar(block.text, folder)
        return
    write_modules(block.page, folder)
    module = importlib.import_module(name)
    found = [each for each in vars(module).values() if is_filter_of(each, name)]
    tests = [each for key, each in vars(module).items() if key.startswith("test_")]
    assert found or tests, "neither a filter nor a test"
    for each in found:
        await runs_untouched(each)
    for test in tests:
        await test()


async def runs_beside_a_sidecar(text: str, folder: Path) -> None:
    """What an application would run, against the configuration at the top of the repository."""
    config = (ROOT / "config.yaml").read_text()
    config = config.replace("127.0.0.1:8080 ", "127.0.0.1:0 ").replace(
        "127.0.0.1:9090 ", "127.0.0.1:0 "
    )
    (folder / "config.yaml").write_text(config)
    async with serving(folder / "config.yaml") as sidecar:
        text = text.replace("127.0.0.1:8080", sidecar.address)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", text),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        assert len(out) > 10
        assert await sidecar.end() == 0


def is_filter_of(each: Any, module: str) -> bool:
    return (
        inspect.isclass(each)
        and issubclass(each, CallFilter | AttemptFilter)
        and each.__module__ == module
    )


async def runs_untouched(example: type[Filter]) -> None:
    """A plain call passes the filter, and its answer as it came."""
    sections: dict[str, FilterConfig] = {}
    if example.UpstreamConfig is not None:
        values = dict.fromkeys(example.UpstreamConfig.model_fields, "x")
        sections["fake"] = example.UpstreamConfig.model_validate(values)
    assert example.__doc__
    async with Harness(Use(example, {}, sections)) as harness:
        run = await harness.run()
        assert run.client.status == 200
        assert run.client.data == b'{"ok": true}'
        harness.upstream.answer = harness.upstream.stream(b'data: {"choices": []}\n\n')
        run = harness.start()
        await run.begun()
        harness.upstream.source.finish(b"data: [DONE]\n\n")
        await run.ended()
        assert run.client.data == b'data: {"choices": []}\n\ndata: [DONE]\n\n'
        await harness.settled()


def test_first_example_takes_a_dozen_lines(folder: Path) -> None:
    write_modules(ROOT / "docs" / "writing-a-filter.md", folder)
    stamp = importlib.import_module("stamp").Stamp
    assert len(inspect.getsource(stamp).splitlines()) <= 12


async def test_documented_stamp_and_organization_reach_their_sides(folder: Path) -> None:
    write_modules(ROOT / "docs" / "writing-a-filter.md", folder)
    stamp = importlib.import_module("stamp").Stamp
    organization = importlib.import_module("organization").Organization
    section = organization.UpstreamConfig(id="org-1")
    async with Harness(stamp, Use(organization, {}, {"fake": section})) as harness:
        run = await harness.run()
    assert run.client.headers["x-llm-model"] == "gpt-4o-mini"
    assert harness.upstream.sent[0].headers["openai-organization"] == "org-1"


async def test_documented_tap_counts(folder: Path) -> None:
    write_modules(ROOT / "docs" / "writing-a-filter.md", folder)
    cut = importlib.import_module("cut_answers").CutAnswers
    async with Harness(cut) as harness:
        harness.upstream.answer = harness.upstream.whole(
            b'{"choices": [{"finish_reason": "length"}, {"finish_reason": "stop"}]}'
        )
        await harness.run()
        assert harness.value("cut_answers", team="tests") == 1


# YAML


def team_file(block: Block) -> str | None:
    """The file that a block says it is, by a first line such as `# teams/search.yaml`."""
    found = re.match(r"# (teams/\w+\.yaml)\n", block.text)
    return found[1] if found else None


def teams_of(block: Block) -> dict[str, str]:
    """The team files that a page shows after this configuration, before the next one."""
    later = YAML[YAML.index(block) + 1 :]
    own = takewhile(lambda each: each.page == block.page and team_file(each), later)
    return {str(team_file(each)): each.text for each in own}


Binder = Callable[..., Bound]


@pytest.fixture
def bound(folder: Path) -> Binder:
    """Write texts as `config.yaml` and team files, with a secret wherever they refer to one."""
    secret = "a-long.secret"  # with the dot that some providers' keys have
    (folder / "secret").write_text(secret)

    def local(text: str) -> str:
        text = text.replace("/etc/sidecar/", f"{folder}/")
        return re.sub(r"\bfile:[\w./-]+", f"file:{folder}/secret", text)

    def bound(config: str, teams: Mapping[str, str]) -> Bound:
        names = re.findall(r"\benv:(\w+)", "".join([config, *teams.values()]))
        environ = {name: f"{secret}-{name}" for name in names}
        if teams:
            (folder / "teams").mkdir()
        for name, text in teams.items():
            (folder / name).write_text(local(text))
        (folder / "config.yaml").write_text(local(config))
        return bind(load_config(folder / "config.yaml", environ), environ)

    return bound


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_block_loads(block: Block, folder: Path, bound: Binder) -> None:
    write_modules(block.page, folder)
    values = list(yaml.safe_load_all(block.text))
    value = values[0]
    if team_file(block):
        blocks_before = [each for each in YAML[: YAML.index(block)] if each.page == block.page]
        shown_with = [each for each in blocks_before if team_file(block) in teams_of(each)]
        assert shown_with, "no configuration stands before this team file"
    elif len(values) == 1 and set(value) & set(Config.model_fields) and "kind" not in value:
        text = block.text
        if "upstreams" not in value:
            text = MOCK + text
            if "chains" not in value and "filters" in value:
                text += f"chains: {{default: {{call: {[*value['filters']]}, attempt: [sign]}}}}\n"
        assert bound(text, teams_of(block)).policies


# The repository's own configurations


def test_configuration_at_the_top_loads() -> None:
    assert bind(load_config(ROOT / "config.yaml", {}), {}).warnings == []


def config_maps() -> Iterator[tuple[str, dict[str, str]]]:
    for path in MANIFESTS:
        for manifest in yaml.safe_load_all(path.read_text()):
            data = manifest["data"] if manifest and manifest.get("kind") == "ConfigMap" else {}
            if "config.yaml" in data:
                yield f"{path.name}/{manifest['metadata']['name']}", data


MAPS = dict(config_maps())


@pytest.mark.parametrize("name", MAPS)
def test_configuration_in_a_config_map_loads(name: str, bound: Binder, folder: Path) -> None:
    data = MAPS[name]
    others = {name: text for name, text in data.items() if name != "config.yaml"}
    assert bound(data["config.yaml"], {f"teams/{name}": text for name, text in others.items()})


# Pages


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_filter_has_a_page_with_its_settings(name: str) -> None:
    text = (ROOT / "docs" / "filters" / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    for heading in ("**Placement:**", "**Cost:**"):
        assert heading in text
    found = filter_class(name)
    settings = dict(found.Config.model_fields)
    if found.UpstreamConfig is not None:
        settings.update(found.UpstreamConfig.model_fields)
    first = text.partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\|", first, re.MULTILINE)
    table = {name: default.strip() for name, default in rows} if settings else {}
    assert set(table) == set(settings)
    for setting, info in settings.items():
        default = info.get_default(call_default_factory=True)
        is_word = default is None or isinstance(default, bool)  # which YAML writes otherwise
        shown = orjson.dumps(default).decode() if is_word else str(default)
        assert table[setting] == ("" if info.is_required() else f"`{shown}`")
    if not settings:
        assert "no settings" in text


@pytest.mark.parametrize("name", SCHEMES)
def test_every_signing_scheme_is_documented_with_its_settings(name: str) -> None:
    text = (ROOT / "docs" / "filters" / "sign.md").read_text()
    (row,) = re.findall(rf"^\| [^|]+ \| `{name}` \| ([^|]*) \| ([^|]*) ?\|$", text, re.MULTILINE)
    secrets, options = (set(re.findall(r"`([a-z_0-9]+)`", cell)) for cell in row)
    scheme = find(name)
    assert secrets == set(scheme.Credentials.model_fields)
    fields = scheme.Options.model_fields
    assert set(fields) <= options
    for option, info in fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, str) and "://" not in default:
            assert f"`{default}`" in row[1], option
        elif isinstance(default, bool | int):
            assert str(default).lower() in row[1], option


def test_settings_of_a_pool_are_documented_with_type_and_default() -> None:
    text = (ROOT / "docs" / "filters" / "sign.md").read_text()
    pool = text.partition("## Several keys")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (\w+) \|", pool, re.MULTILINE)
    fields = PoolSettings.model_fields.keys() - SignSettings.model_fields.keys()
    assert {name for name, _, _ in rows} == fields
    assert ("set_aside_s", "number, above 0", f"{SET_ASIDE_S:.0f}") in rows


def test_fields_of_a_request_to_sign_are_documented_with_their_defaults() -> None:
    text = (ROOT / "docs" / "filters" / "sign.md").read_text()
    table = text.partition("### Its input")[2]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]+) \|", table, re.MULTILINE))
    inner = {f"request.{name}": field for name, field in RequestVector.model_fields.items()}
    outer = {k: field for k, field in WholeVector.model_fields.items() if k != "request"}
    assert set(rows) == {*inner, *outer}
    for name, field in inner.items():
        assert (rows[name] == "required") == field.is_required(), name


async def test_azure_s_sdk_calls_azure_s_path_through_the_documented_upstream() -> None:
    (base_url,) = [
        value["upstreams"]["azure-classic"]["base_url"]
        for value in (yaml.safe_load(block.text) for block in YAML)
        if "azure-classic" in value.get("upstreams", {})
    ]
    (endpoint,) = re.findall(
        r'azure_endpoint="([^"]+)"', (ROOT / "docs" / "providers.md").read_text()
    )
    called = []

    async def answer(request: web.Request) -> web.Response:
        called.append(request.path)
        return web.json_response({"id": "a", "object": "chat.completion", "choices": []})

    async with TestServer(application(answer)) as server:
        client = openai.AsyncAzureOpenAI(
            azure_endpoint=endpoint.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
            api_key="any",
            api_version="2024-10-21",
        )
        async with client:
            await client.chat.completions.create(model="mine", messages=[])
    assert called == ["/azure-classic/openai/deployments/mine/chat/completions"]
    # What stands for the prefix.
    assert base_url == "https://my-resource.openai.azure.com"


def application(answer: Callable[[web.Request], Awaitable[web.Response]]) -> web.Application:
    """A server that answers every request so."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    return app


def test_every_signing_scheme_has_a_block_among_the_providers() -> None:
    shown = [each for each in YAML if each.page.name == "providers.md"]
    sections = [
        upstream["sign"]
        for block in shown
        for upstream in yaml.safe_load(block.text)["upstreams"].values()
        if "sign" in upstream
    ]
    assert {section["scheme"] for section in sections} == set(SCHEMES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_speak_of_files_that_exist(page: Path) -> None:
    for target in re.findall(r"`((?:sidecar|filters|tests|docs|k8s)/[\w./-]+)`", page.read_text()):
        assert (ROOT / target).exists(), target


def test_documented_metrics_are_those_that_are_counted() -> None:
    from filters.metrics import CallMetrics

    text = (ROOT / "docs" / "filters" / "metrics.md").read_text()
    documented = {
        name.removesuffix("_total"): tuple(re.findall(r"\w+", labels))
        for name, labels in re.findall(r"^\| `(\w+)` \| (.*?) ?\|", text, re.MULTILINE)
    }
    made = Harness(CallMetrics).metrics.snapshot()
    assert documented == {family["name"]: tuple(family["labels"]) for family in made}


def codes_of(source: Path) -> set[str]:
    """The stable codes of the errors that a module makes."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            texts = [
                each.value
                for each in node.args
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
            if node.func.id in ("Rejected", "CallError", "UpstreamError", "NoAnswer") and texts:
                found.add(texts[0])
    return found


SOURCES = [*(ROOT / "sidecar").rglob("*.py"), *(ROOT / "filters").rglob("*.py")]


def first_words_of_calls(methods: Collection[str]) -> set[str]:
    """The first arguments of all calls of methods with such names, as far as they are texts."""
    return {
        node.args[0].value
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def test_every_metric_is_listed_for_operators() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    made = first_words_of_calls(("counter", "gauge", "histogram"))
    assert {"llm_sidecar_cache", "llm_api_open_calls", "llm_sidecar_overhead_seconds"} <= made
    assert {name for name in made if not re.search(rf"`{name}(_total)?`", page)} == set()


def test_every_event_of_the_log_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    logged = first_words_of_calls(("info", "warning", "error", "exception"))
    assert {"reloaded", "price_unknown", "store_down"} <= logged
    assert {name for name in logged if f"`{name}`" not in page} == set()


def test_every_error_code_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    codes = set().union(*map(codes_of, SOURCES))
    assert {"model_not_found", "upstream_closed", "origin_not_allowed"} <= codes
    assert {code for code in codes if f"`{code}`" not in page} == set()
