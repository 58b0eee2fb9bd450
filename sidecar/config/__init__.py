"""Configuration: from YAML files to checked types, with every problem at its line and column.

document.py     one file as values with places       schema.py    the types, defaults and units
references.py   env: and file:                       secret.py    a value that is never shown
explain.py      pydantic's errors in our words       load.py      files to types
registry.py     filters by name                      check.py     what the sections mean together
rules.py        addresses, headers, patterns     override.py  the command line's values
redacted.py     for people to look at
"""

from sidecar.config.check import Bound, BoundPolicy, FilterSpec, bind, implicit_team
from sidecar.config.load import Loaded, load_config
from sidecar.config.override import override
from sidecar.config.redacted import redacted
from sidecar.config.schema import Config

__all__ = [
    "Bound",
    "BoundPolicy",
    "Config",
    "FilterSpec",
    "Loaded",
    "bind",
    "implicit_team",
    "load_config",
    "override",
    "redacted",
]
