"""What the command line says instead of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import PositiveInt, ValidationError

from sidecar.config.load import Loaded
from sidecar.config.schema import Address, Settings
from sidecar.errors import ConfigError, Problem


class CommandLine(Settings):
    """The settings that may be given there; what is not given stays as in the file."""

    listen: Address = ""
    admin: Address | None = None
    workers: PositiveInt = 1


def override(loaded: Loaded, values: Mapping[str, Any]) -> Loaded:
    """`loaded` with `values`, which are checked as the file's are. Raises `ConfigError`."""
    try:
        CommandLine.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    "command line",
                    0,
                    0,
                    f"--{each['loc'][0]}",
                    each["msg"].removeprefix("Value error, "),
                )
                for each in error.errors(include_input=False, include_url=False)
            ]
        ) from None
    return replace(loaded, config=loaded.config.model_copy(update=dict(values)))
