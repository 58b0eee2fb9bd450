"""The walls of the code base: who may import what, and what importing may do.

A wall that is in the way is moved here, in the table, with a reason; never climbed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from aiohttp import StreamReader, web_protocol
from aiohttp.http import HttpRequestParser
from aiohttp.web_protocol import RequestHandler

from filters import BUILTIN

ROOT = Path(__file__).parent.parent

LAYERS: tuple[tuple[str, ...], ...] = (
    # No knowledge of calls.
    (
        *("errors", "clock", "tasks", "log", "metrics", "resources", "headers", "listen"),
        "addresses",
        *("config.references", "config.secret"),  # values that filters' settings are made of
    ),
    # A call, its bytes, and what they mean.
    ("call", "eventstream", "sse", "reply", "dialects"),
    # The filter contract, and who is served by which chain.
    ("filter", "chain", "team", "api"),
    # Settings as data. They name filters, so they stand above the contract.
    ("config",),
    # To the upstream; the mock is one.
    ("transport", "dispatch", "mock"),
    # A configuration that lives.
    ("snapshot",),
    # To the client and the operator.
    ("edge", "admin", "server"),
    ("process", "reload"),  # a reload swaps the snapshot of a server
    ("cli", "__main__"),
)
"""Modules and packages of `sidecar`, from the ground up: a module imports its own layer and those
below. The longest name that fits decides."""

AIOHTTP_IN = {"edge", "admin", "server", "process", "mock", "transport.fetch"}
HTTPTOOLS_IN = {"transport"}

FILTERS_MAY_IMPORT = ("sidecar.api", "filters.algo", "filters.stores", "filters.signers")

EDGE_USES = (
    *("_task_handler", "_messages", "_waiter", "_parser", "_buffer_paused", "_loop", "_paused"),
    *("_msg_queue_resume_size", "_resume_reading_if_drained", "_request_in_progress"),
    *("_force_close", "_close", "_drain_helper", "_next_keepalive_close_time"),
    *("_keepalive_timeout", "_keepalive_handle", "_process_keepalive", "_reading_paused"),
)
"""Names that aiohttp does not promise and `sidecar/edge.py` is built on."""


PAYLOAD_USES = ("_buffer",)
"""The same of the request's body, `aiohttp.StreamReader`."""


class Import(NamedTuple):
    """One import as it stands in a file; `is_late`: inside a function."""

    module: str
    is_late: bool
    line: int


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path) -> Iterator[Import]:
    """What a file imports when it runs; imports for type checkers are left out."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    stack: list[tuple[ast.AST, bool]] = [(tree(path), False)]
    while stack:
        node, is_late = stack.pop()
        if isinstance(node, ast.stmt) and is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (Import(each.name, is_late, node.lineno) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            for each in node.names:
                is_module = find_module(f"{base}.{each.name}") is not None
                yield Import(f"{base}.{each.name}" if is_module else base, is_late, node.lineno)
        is_late = is_late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack += [(child, is_late) for child in ast.iter_child_nodes(node)]


def find_module(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    for each in (path.with_suffix(".py"), path / "__init__.py"):
        if each.is_file():
            return each
    return None


def layer_of(module: str) -> int | None:
    """The layer of a module of `sidecar`, by the longest name in the table that fits."""
    name = module.removeprefix("sidecar").removeprefix(".")
    fitting = [
        (len(entry), number)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if name == entry or name.startswith(f"{entry}.")
    ]
    return max(fitting)[1] if fitting else None


def unit_of(path: Path) -> str:
    """The first name below `sidecar`."""
    return name_of(path).split(".")[1] if "." in name_of(path) else ""


SIDECAR = modules("sidecar")
FILTERS = modules("filters")


def by_name(path: Path) -> str:
    return name_of(path)


@pytest.mark.parametrize("path", SIDECAR, ids=by_name)
def test_imports_inside_of_sidecar_point_down(path: Path) -> None:
    if name_of(path) == "sidecar":
        assert not [each for each in imports(path) if each.module.startswith("sidecar")]
        return
    own = layer_of(name_of(path))
    assert own is not None, "this module has no layer yet: give it one in LAYERS"
    for each in imports(path):
        if each.module.startswith("sidecar."):
            other = layer_of(each.module)
            assert other is not None, f"line {each.line}: {each.module} has no layer"
            assert other <= own, f"line {each.line}: {each.module} stands above"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        name_of(path): {each.module for each in imports(path) if not each.is_late}
        for path in SIDECAR
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name in done or name not in edges:
            return
        for each in sorted(edges[name]):
            visit(each, (*way, name))
        done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("path", SIDECAR, ids=by_name)
def test_sidecar_never_imports_filters_or_tests(path: Path) -> None:
    for each in imports(path):
        assert each.module.split(".")[0] not in ("filters", "tests", "bench"), f"line {each.line}"


@pytest.mark.parametrize("path", FILTERS, ids=by_name)
def test_filters_import_the_api_and_their_own_tools_alone(path: Path) -> None:
    for each in imports(path):
        if each.module.split(".")[0] in ("sidecar", "filters"):
            allowed = each.module.startswith(FILTERS_MAY_IMPORT)
            assert allowed, f"line {each.line}: {each.module}; use sidecar.api"


@pytest.mark.parametrize("path", SIDECAR, ids=by_name)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    for each in imports(path):
        library = each.module.split(".")[0]
        if library == "aiohttp":
            name = name_of(path).removeprefix("sidecar.")
            assert {name, unit_of(path)} & AIOHTTP_IN, f"line {each.line}"
        if library == "httptools":
            assert unit_of(path) in HTTPTOOLS_IN, f"line {each.line}"


# What importing does

EFFECTS = re.compile(
    r"\bos\.(environ|getenv|mkdir|makedirs|open|read|write|system|popen)\b|\bopen\(|\bprint\("
    r"|\bsocket\.socket\(|\bsubprocess\.|\.read_text\(|\.read_bytes\(|\.write_text\("
    r"|\basyncio\.(run|get_event_loop|new_event_loop)\(|\blogging\.basicConfig\("
)


def runs_at_import(path: Path) -> Iterator[ast.AST]:
    """The expressions that run when the module is imported: not the bodies of functions."""
    stack: list[ast.AST] = [tree(path)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += [*node.decorator_list, *node.args.defaults]
            stack += [each for each in node.args.kw_defaults if each is not None]
        elif isinstance(node, ast.Lambda) or (
            isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        ):
            continue
        else:
            if isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
                yield node
            stack += list(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", [*SIDECAR, *FILTERS], ids=by_name)
def test_importing_has_no_effects(path: Path) -> None:
    for node in runs_at_import(path):
        found = EFFECTS.search(ast.unparse(node))
        assert not found, f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", [*SIDECAR, *FILTERS], ids=by_name)
def test_no_global_is_bound_again_later(path: Path) -> None:
    rebound = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
    assert rebound == []


# What every file says of itself


@pytest.mark.parametrize("path", [*SIDECAR, *FILTERS], ids=by_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    if path.name == "__main__.py":
        return
    assert ast.get_docstring(tree(path)), "it has no docstring"


@pytest.mark.parametrize("path", [*SIDECAR, *FILTERS], ids=by_name)
def test_nothing_is_left_to_do(path: Path) -> None:
    found = re.search(r"\b(TODO|FIXME|XXX|HACK)\b|except Exception: *pass", path.read_text())
    assert not found


def test_every_filter_file_is_in_the_table() -> None:
    files = {path.stem for path in (ROOT / "filters").glob("*.py")} - {"__init__"}
    assert files == set(BUILTIN)
    for name, target in BUILTIN.items():
        assert target.startswith(f"filters.{name}:")


# Coupling to aiohttp


def names_of(found: type) -> set[str]:
    """What a class of aiohttp has: its methods, and the attributes that it sets."""
    names = set(dir(found))
    for each in found.__mro__:
        if each.__module__.startswith("aiohttp"):
            nodes = ast.walk(tree(Path(inspect.getfile(each))))
            names |= {
                node.attr
                for node in nodes
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            }
    return names


def test_names_that_the_edge_takes_from_aiohttp_are_still_there() -> None:
    """`EdgeProtocol.start` stands in for aiohttp's own; see docs/adr/0003-edge-on-aiohttp.md."""
    assert set(EDGE_USES) <= names_of(RequestHandler)
    assert set(PAYLOAD_USES) <= names_of(StreamReader)
    assert "message_consumed" in dir(HttpRequestParser)
    assert "exc" in web_protocol._ErrInfo.__annotations__


def test_list_of_names_taken_from_aiohttp_is_complete() -> None:
    module = tree(ROOT / "sidecar" / "edge.py")
    (edge,) = (
        node
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == "EdgeProtocol"
    )
    slots = next(
        ast.literal_eval(node.value)
        for node in edge.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"
    )
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    own = {node.name for node in edge.body if isinstance(node, functions)}
    assert private_names(edge, "self") - own - set(slots) == set(EDGE_USES)
    assert private_names(module, "payload") == set(PAYLOAD_USES)
    imported = {
        alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiohttp")
        for alias in node.names
    }
    assert {name for name in imported if name.startswith("_")} == {"_ErrInfo"}


def private_names(where: ast.AST, of: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(where)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == of
        and node.attr.startswith("_")
    }


def test_aiohttp_is_pinned_to_the_versions_the_edge_is_built_on() -> None:
    pins = re.findall(r'"aiohttp([^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert pins == [">=3.14.4,<3.15"]


# Requirements

FILES = ["pyproject.toml", *(f"requirements/{p.name}" for p in (ROOT / "requirements").iterdir())]


@pytest.mark.parametrize("name", sorted(FILES))
def test_requirements_name_no_index_and_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    if name == "pyproject.toml":
        text = re.sub(r"\[project\.urls\].*?(?=\n\[|\Z)", "", text, flags=re.DOTALL)
    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find-links|trusted-host", text)


def test_locked_requirements_have_hashes() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert len(re.findall(r"^[a-z0-9].*==", text, re.MULTILINE)) > 10
        for line in re.findall(r"^[A-Za-z0-9].*$", text, re.MULTILINE):
            assert line.endswith("\\"), f"{path.name}: {line} has no hash"
