"""Every built-in filter: building is pure, starting and stopping may happen at any time."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from itertools import pairwise

import pytest

from filters import BUILTIN
from sidecar.api import AttemptFilter, CallFilter, FilterConfig
from tests.contract.builtin import filter_class
from tests.support.harness import Harness, Use


async def test_stop_without_start(use: Use) -> None:
    (made,) = Harness(use).filters
    await made.stop()


async def test_stop_twice(use: Use) -> None:
    (made,) = Harness(use).filters
    await made.start()
    await made.stop()
    await made.stop()


async def test_started_twice_it_still_works_and_stops(use: Use) -> None:
    async with Harness(use) as harness:
        (made,) = harness.filters
        await made.start()
        assert (await harness.run()).client.status == 200
        await made.stop()


async def test_works_again_when_built_anew_on_the_same_resources(use: Use) -> None:
    async with Harness(use) as harness:
        assert (await harness.run()).client.status == 200
        again = harness._make(use)
        await again.start()
        await again.stop()
        assert (await harness.run()).client.status == 200


def test_is_built_without_a_loop(use: Use) -> None:
    Harness(use)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_is_of_one_kind_and_explains_itself(name: str) -> None:
    found = filter_class(name)
    assert issubclass(found, CallFilter) != issubclass(found, AttemptFilter)
    assert found.__doc__
    assert len(found.__doc__) > 80
    assert "place it" in found.__doc__.lower().replace("\n    ", " ")
    for settings in (found.Config, found.UpstreamConfig):
        assert settings is None or issubclass(settings, FilterConfig)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_setting_is_explained_beside_its_field(name: str) -> None:
    found = filter_class(name)
    for settings in (found.Config, found.UpstreamConfig):
        if settings is not None and settings.model_fields:
            classes = [
                each for each in settings.__mro__ if each.__module__ != FilterConfig.__module__
            ]
            sources = [
                inspect.getsource(each) for each in classes if issubclass(each, FilterConfig)
            ]
            nodes = [ast.parse(textwrap.dedent(source)).body[0] for source in sources]
            explained = {
                field.target.id
                for node in nodes
                if isinstance(node, ast.ClassDef)
                for field, text in pairwise(node.body)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
            assert explained == set(settings.model_fields)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_file_holds_one_filter(name: str) -> None:
    module = sys.modules[filter_class(name).__module__]
    classes = [
        node.name
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ClassDef)
    ]
    found = [each for each in classes if _is_filter(getattr(module, each))]
    assert found == [filter_class(name).__name__]


def _is_filter(each: type) -> bool:
    return issubclass(each, CallFilter | AttemptFilter)
