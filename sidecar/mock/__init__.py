"""A scripted provider that plays those we know: for `base_url: "mock:"`, demos and tests."""

from sidecar.mock.books import Books, ModelBook, Received
from sidecar.mock.provider import MockProvider
from sidecar.mock.script import Rule, Script, ScriptError, SettingError, Settings

__all__ = [
    "Books",
    "MockProvider",
    "ModelBook",
    "Received",
    "Rule",
    "Script",
    "ScriptError",
    "SettingError",
    "Settings",
]
