"""The filter contract: settings, the kit, and the three ways in which a filter is found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from sidecar import api
from sidecar.api import CallFilter, FilterConfig, Kit, Secret, StoreAddress
from sidecar.config import Bound, bind, load_config
from sidecar.config.registry import GROUP, builtin_filters, find_filter
from sidecar.errors import ConfigError
from sidecar.filter import PANEL, HeaderName, KitResources
from sidecar.resources import Resources
from tests.support.harness import Harness, Use

LOCAL = '''
from sidecar.api import Call, CallFilter, CallNext, FilterConfig, Reply


class Stamp(CallFilter):
    """Stamps answers."""

    class Config(FilterConfig):
        value: str = "local"

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        call.set_reply_header("x-stamp", self.config.value)
        return await call_next(call)


NO_FILTER = 1
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A configuration directory whose modules are forgotten afterwards."""
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("stamping"):
            del sys.modules[name]


Configure = Callable[..., Bound]


@pytest.fixture
def configure(folder: Path) -> Configure:
    """Bind a configuration with this call chain, and `extra` YAML."""

    def configure(chain: str, extra: str = "") -> Bound:
        path = folder / "config.yaml"
        path.write_text(
            'upstreams: {mock: {dialect: openai, base_url: "mock:"}}\n'
            f"chains: {{default: {{call: [{chain}], attempt: []}}}}\n{extra}"
        )
        return bind(load_config(path, {}), {})

    return configure


def packaged(folder: Path, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that names a filter."""
    site = folder / "site"
    info = site / "stamping_package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stamping-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")
    (site / "stamping_package.py").write_text(LOCAL)
    monkeypatch.syspath_prepend(str(site))


# How filters are found


@pytest.mark.parametrize("name", sorted(builtin_filters()))
def test_builtin_filter_is_found_by_its_name(name: str, tmp_path: Path) -> None:
    found = find_filter(name, tmp_path)
    assert f"{found.__module__}:{found.__name__}" == builtin_filters()[name]


async def test_packaged_filter_is_found_by_its_entry_point(
    folder: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(folder, "stamp = stamping_package:Stamp", monkeypatch)
    bound = configure("stamp", "filters: {stamp: {value: packaged}}")
    await _stamps(bound, "packaged")


async def test_local_filter_is_found_beside_the_configuration(
    folder: Path, configure: Configure
) -> None:
    (folder / "stamping.py").write_text(LOCAL)
    await _stamps(configure("'stamping:Stamp'"), "local")


async def test_local_filter_has_its_settings_under_the_name_it_is_used_by(
    folder: Path, configure: Configure
) -> None:
    (folder / "stamping.py").write_text(LOCAL)
    bound = configure("'stamping:Stamp'", "filters: {'stamping:Stamp': {value: mine}}")
    await _stamps(bound, "mine")


async def _stamps(bound: Bound, value: str) -> None:
    (policy,) = bound.policies
    (spec,) = policy.call
    assert spec.filter_class.__name__ == "Stamp"
    async with Harness(Use(spec.filter_class, spec.config.model_dump())) as harness:
        run = await harness.run()
    assert run.client.headers["x-stamp"] == value


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("metrcs", 'there is no filter "metrcs", did you mean "metrics"?'),
        ("'stamping:Stmp'", 'the module "stamping" has no "Stmp", did you mean "Stamp"?'),
        ("'stamping:NO_FILTER'", '"stamping:NO_FILTER" is no CallFilter or AttemptFilter'),
        ("'stampin_g:Stamp'", '"stampin_g:Stamp" cannot be imported: ModuleNotFoundError'),
        ("'stamping_broken:Stamp'", '"stamping_broken:Stamp" cannot be imported: LookupError'),
        ("broken_package", '"broken_package" cannot be imported: ModuleNotFoundError'),
    ],
)
def test_filter_that_cannot_be_used_does_not_load_and_says_why(
    chain: str,
    message: str,
    folder: Path,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "stamping.py").write_text(LOCAL)
    (folder / "stamping_broken.py").write_text("raise LookupError('at import')\n")
    packaged(folder, "broken_package = not_there_at_all:Stamp", monkeypatch)
    with pytest.raises(ConfigError) as raised:
        configure(chain)
    (problem,) = raised.value.problems
    assert problem.message.startswith(message)
    assert (problem.path, problem.line) == ("chains.default.call[0]", 2)


def test_chain_in_a_wrong_order_does_not_load(folder: Path, configure: Configure) -> None:
    (folder / "stamping.py").write_text(
        "from sidecar.api import USAGE, CallFilter\n\n\n"
        "class Stamp(CallFilter):\n    needs = frozenset({USAGE})\n"
    )
    with pytest.raises(ConfigError, match="needs usage: put token_counter before it"):
        configure("'stamping:Stamp', token_counter")
    assert configure("token_counter, 'stamping:Stamp'")


# Settings


class Limits(FilterConfig):
    burst: int = 1
    mode: Literal["a", "b"] = "a"
    header: HeaderName = "x-limit"


def test_settings_are_strict_frozen_and_closed() -> None:
    assert Limits.model_validate({"burst": 2}).burst == 2
    for wrong in (
        {"burst": "2"},
        {"burst": 2.0},
        {"burst": True},
        {"brust": 2},
        {"mode": "c"},
        {"header": "a b"},
        {"header": "content-length"},
    ):
        with pytest.raises(ValidationError) as raised:
            Limits.model_validate(wrong)
        assert "input_value" not in str(raised.value)
    with pytest.raises(ValidationError):
        Limits().burst = 3
    assert Limits(header="X-Limit").header == "x-limit"


def test_chain_without_a_giver_of_what_a_filter_reads_does_not_load(
    folder: Path, configure: Configure
) -> None:
    (folder / "stamping.py").write_text(
        "from sidecar.api import USAGE, CallFilter\n\n\n"
        "class Stamp(CallFilter):\n    reads = frozenset({USAGE})\n"
    )
    with pytest.raises(ConfigError) as raised:
        configure("request_id, 'stamping:Stamp'")
    (problem,) = raised.value.problems
    assert problem.message == (
        "stamping:Stamp reads usage: add token_counter, which gives it, to the list `call`"
    )
    assert (problem.path, problem.line) == ("chains.default.call[1]", 2)
    assert configure("'stamping:Stamp', token_counter")
    assert configure("token_counter, 'stamping:Stamp'")


def test_secret_in_settings_is_not_shown() -> None:
    class Hook(FilterConfig):
        token: Secret

    shown = Hook(token=Secret("canary", "env:TOKEN"))
    assert "canary" not in f"{shown!r}{shown}{shown.model_dump_json()}"
    assert shown.token.reveal() == "canary"


async def test_filter_without_settings_refuses_every_key() -> None:
    with pytest.raises(ValidationError):
        Use(CallFilter, {"a": 1}).filter_class.Config.model_validate({"a": 1})
    made = CallFilter(CallFilter.Config(), None)  # type: ignore[arg-type]
    await made.start()
    await made.stop()
    await made.stop()


# The kit


def test_kit_says_where_shared_state_lives_and_how_many_share_the_machine() -> None:
    seen: list[Kit] = []

    class Looks(CallFilter):
        def __init__(self, config: FilterConfig, kit: Kit) -> None:
            super().__init__(config, kit)
            seen.append(kit)

    Harness(Looks)
    store = StoreAddress(Secret("redis://:canary@h:1/0", "env:STORE"), "mine")
    Harness(Looks, store=store, workers=4)
    assert [(kit.store.url is None, kit.store.prefix, kit.workers) for kit in seen] == [
        (True, "sidecar", 1),
        (False, "mine", 4),
    ]
    assert "canary" not in repr(seen[1].store)


class Switch:
    """A panel of one switch."""

    def __init__(self) -> None:
        self.is_on = False

    async def show(self) -> Any:
        return {"on": self.is_on}

    async def act(self, command: Mapping[str, Any]) -> Any:
        if not isinstance(command.get("on"), bool):
            raise ValueError('say {"on": true} or {"on": false}')
        self.is_on = command["on"]
        return await self.show()


def test_panel_is_made_by_whoever_asks_first_and_shared_by_name() -> None:
    panels: list[Switch] = []

    class Shows(CallFilter):
        def __init__(self, config: FilterConfig, kit: Kit) -> None:
            super().__init__(config, kit)
            panels.append(kit.panel("switch", Switch))
            panels.append(kit.panel("other", Switch))

    harness = Harness(Shows, Shows)
    assert panels[0] is panels[2] is not panels[1]
    assert harness.resources.of_kind(PANEL) == {"switch": panels[0], "other": panels[1]}


def test_api_has_all_that_a_filter_may_import() -> None:
    for name in ("KeyGate", "LOST_USAGE", "Panel", "StoreAddress", "Timer"):
        assert name in api.__all__
        assert hasattr(api, name)


# Resources


async def test_panel_leaves_with_the_last_snapshot_that_uses_it() -> None:
    resources = Resources()
    for generation in (1, 2):
        KitResources(resources, generation).get((PANEL, "switch"), Switch)
    await resources.drop_user(1)
    assert list(resources.of_kind(PANEL)) == ["switch"]
    await resources.drop_user(2)
    assert resources.of_kind(PANEL) == {}


async def test_state_under_a_key_outlives_the_snapshot_that_made_it() -> None:
    closed: list[str] = []

    class Bucket:
        async def close(self) -> None:
            closed.append("closed")

    resources = Resources()
    old, new = KitResources(resources, 1), KitResources(resources, 2)
    bucket = old.get(("bucket", "team"), Bucket)
    assert new.get(("bucket", "team"), Bucket) is bucket
    assert old.get(("bucket", "other"), Bucket) is not bucket
    await resources.drop_user(1)
    assert closed == ["closed"]  # the one that the new snapshot did not ask for
    assert new.get(("bucket", "team"), Bucket) is bucket
    await resources.drop_user(2)
    assert closed == ["closed", "closed"]
    assert len(resources) == 0
