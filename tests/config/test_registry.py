from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pytest

from sidecar.config import registry
from sidecar.config.registry import FilterNotFound, find_filter, where_settings_go

if TYPE_CHECKING:
    from conftest import Place

LOCAL = """\
from sidecar.api import CallFilter, FilterConfig

class Shout(CallFilter):
    class Config(FilterConfig):
        volume: int = 1

class Other:
    pass
"""


def refusal(place: Place, name: str) -> str:
    with pytest.raises(FilterNotFound) as caught:
        find_filter(name, place.directory)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _forget_local_modules() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("local_")]:
        del sys.modules[name]


def test_a_builtin_filter_is_found_by_name(place: Place) -> None:
    assert find_filter("plain", place.directory).__name__ == "Plain"


def test_a_local_filter_is_found_beside_the_configuration(place: Place) -> None:
    place.write("local_found.py", LOCAL)
    path = list(sys.path)
    assert find_filter("local_found:Shout", place.directory).__name__ == "Shout"
    assert sys.path == path


def test_the_search_path_is_as_before_when_a_local_filter_fails(place: Place) -> None:
    place.write("local_fails.py", "raise RuntimeError('no luck')")
    path = list(sys.path)
    assert refusal(place, "local_fails:Shout") == (
        '"local_fails:Shout" cannot be imported: RuntimeError: no luck'
    )
    assert sys.path == path


def test_a_module_that_is_not_there_or_no_python_is_named(place: Place) -> None:
    assert refusal(place, "local_none:A") == (
        "\"local_none:A\" cannot be imported: ModuleNotFoundError: No module named 'local_none'"
    )
    place.write("local_wrong.py", "class")
    assert refusal(place, "local_wrong:A").startswith(
        '"local_wrong:A" cannot be imported: SyntaxError: '
    )


def test_a_class_that_is_not_in_the_module_comes_with_the_one_that_was_meant(place: Place) -> None:
    place.write("local_typo.py", LOCAL)
    assert refusal(place, "local_typo:Shoot") == (
        'the module "local_typo" has no "Shoot", did you mean "Shout"?'
    )


@pytest.mark.parametrize("name", ["Other", "FilterConfig", "__name__", "CallFilter"])
def test_what_is_no_filter_is_refused(place: Place, name: str) -> None:
    place.write("local_kinds.py", LOCAL)
    assert refusal(place, f"local_kinds:{name}") == (
        f'"local_kinds:{name}" is no CallFilter or AttemptFilter'
    )


def test_settings_that_are_no_filter_config_are_refused(place: Place) -> None:
    assert refusal(place, "bad_config") == '"bad_config" has settings that are no FilterConfig'


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("limit", "it goes under `filters`"),
        ("breaker", "it goes into the section `breaker` of an upstream"),
        ("plain", "this filter has no settings: remove the section"),
        ("bad_config", ""),
        ("unknown", ""),
    ],
)
def test_a_built_in_filter_s_settings_have_their_place(name: str, hint: str) -> None:
    assert where_settings_go(name) == hint


def test_an_unknown_name_comes_with_the_one_that_was_meant(place: Place) -> None:
    assert refusal(place, "limits") == 'there is no filter "limits", did you mean "limit"?'
    assert refusal(place, "zzz") == (
        'there is no filter "zzz"; known are: bad_config, breaker, gives, limit, needs, plain, '
        "reads, sign, webhook, or write module:Class"
    )


def test_a_package_names_its_filters_in_an_entry_point(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        EntryPoint("packaged", "builtin_stand_ins:Limit", registry.GROUP),
        EntryPoint("broken", "local_nothing:Limit", registry.GROUP),
        EntryPoint("plain", "builtin_stand_ins:Limit", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert find_filter("packaged", place.directory).__name__ == "Limit"
    assert find_filter("plain", place.directory).__name__ == "Plain"  # built-in names stay ours
    assert refusal(place, "broken") == (
        "\"broken\" cannot be imported: ModuleNotFoundError: No module named 'local_nothing'"
    )
    assert refusal(place, "packagd") == 'there is no filter "packagd", did you mean "packaged"?'


def test_the_entry_points_of_installed_packages_are_asked_for() -> None:
    assert registry.entry_points is importlib.metadata.entry_points
