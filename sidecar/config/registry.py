"""Filters by name: the built-in table, installed packages, and local files."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.config.explain import did_you_mean

if TYPE_CHECKING:
    from sidecar.filter import Filter

GROUP = "sidecar.filters"
"""The entry-point group in which a package names its filters."""


class FilterNotFound(Exception):
    """No filter has that name, or it cannot be used; the message says why."""


def builtin_filters() -> dict[str, str]:
    """The built-in filters: name to `module:Class`."""
    # Looked up by name: filters import the sidecar, never the other way round.
    return dict(importlib.import_module("filters").BUILTIN)


def find_filter(name: str, directory: Path) -> type[Filter]:
    """The class that a chain means by `name`: a known name, or `module:Class`.

    A local module is looked for in `directory` first. A module that is already imported is not
    read again. Raises FilterNotFound.
    """
    if ":" in name:
        return _checked(name, _import(name, name, directory))
    known = builtin_filters()
    if name in known:
        return _checked(name, _import(name, known[name], None))
    packaged = {point.name: point for point in entry_points(group=GROUP)}
    if name in packaged:
        return _checked(name, _load(name, packaged[name]))
    names = sorted({*known, *packaged})
    hint = did_you_mean(name, names) or f"; known are: {', '.join(names)}, or write module:Class"
    raise FilterNotFound(f'there is no filter "{name}"{hint}')


def where_settings_go(name: str) -> str:
    """Where the settings of a built-in filter stand, as a hint; empty for other names."""
    try:
        found = find_filter(name, Path()) if name in builtin_filters() else None
    except FilterNotFound:
        found = None
    if found is None:
        return ""
    if found.Config.model_fields:
        return "it goes under `filters`"
    if found.UpstreamConfig is not None:
        return f"it goes into the section `{name}` of an upstream"
    return "this filter has no settings: remove the section"


def _load(name: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise _cannot_import(name, error) from error


def _import(name: str, target: str, directory: Path | None) -> Any:
    module_name, _, class_name = target.partition(":")
    path = [] if directory is None else [str(directory.absolute())]
    sys.path[:0] = path
    try:
        if path:
            importlib.invalidate_caches()  # the file may be younger than the directory's listing
        module = importlib.import_module(module_name)
    except Exception as error:
        raise _cannot_import(name, error) from error
    finally:
        for each in path:
            sys.path.remove(each)
    if not hasattr(module, class_name):
        hint = did_you_mean(class_name, vars(module))
        raise FilterNotFound(f'the module "{module_name}" has no "{class_name}"{hint}')
    return getattr(module, class_name)


def _cannot_import(name: str, error: Exception) -> FilterNotFound:
    return FilterNotFound(f'"{name}" cannot be imported: {type(error).__name__}: {error}')


def _checked(name: str, found: Any) -> type[Filter]:
    # Here and not above: the filter contract brings the metrics library along.
    from sidecar.filter import AttemptFilter, CallFilter, FilterConfig

    bases = (CallFilter, AttemptFilter)
    if not isinstance(found, type) or not issubclass(found, bases) or found in bases:
        raise FilterNotFound(f'"{name}" is no CallFilter or AttemptFilter')
    for settings in (found.Config, found.UpstreamConfig):
        if settings is not None and not issubclass(settings, FilterConfig):
            raise FilterNotFound(f'"{name}" has settings that are no FilterConfig')
    return found
