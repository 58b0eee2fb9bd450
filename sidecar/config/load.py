"""From files to checked types: `config.yaml`, its team files, and the secrets they refer to.

Each section is checked by itself here; what the sections mean together is `check.py`'s.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sidecar.config.document import Document, Keys, parse, read
from sidecar.config.explain import explain
from sidecar.config.references import References
from sidecar.config.registry import where_settings_go
from sidecar.config.schema import Config, TeamSettings
from sidecar.errors import ConfigError, Problem

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration whose sections are all right, each by itself."""

    config: Config
    teams: tuple[TeamSettings, ...]
    """In the order of their files' names; empty when `teams` is not configured."""
    path: Path
    """The configuration file."""
    files: tuple[Path, ...]
    """Everything that was read: configuration, team files, secrets, certificates."""
    document: Document = field(repr=False)
    team_documents: tuple[Document, ...] = field(repr=False)
    """One for each of `teams`, in the same order."""
    warnings: list[str]
    """What is allowed and yet worth a line in the log, with its place."""
    references: References = field(repr=False)
    """What resolved those of the configuration file."""


def load_config(
    path: Path,
    environ: Mapping[str, str] | None = None,
    *,
    references_by: type[References] = References,
) -> Loaded:
    """Read and check the configuration file at `path` and all that it refers to.

    `environ` is where `env:NAME` is looked up; None: the process's environment. `references_by`
    resolves what is referred to. Raises ConfigError with every problem of every file, in the order
    of the files and lines.
    """
    path = Path(path)
    references = references_by(path.parent, os.environ if environ is None else environ)
    reader = _Reader()
    read_config = reader.read(path, Config, references)
    config, document = read_config if read_config else (None, None)
    teams: list[tuple[TeamSettings, Document]] = []
    team_paths = reader.team_paths(path)
    for team_path in team_paths:
        if team := reader.read(team_path, TeamSettings, references.at(team_path.parent)):
            teams.append(team)
    if reader.problems or config is None or document is None:
        raise ConfigError(reader.in_order())
    return Loaded(
        config=config,
        teams=tuple(team for team, _ in teams),
        path=path,
        files=(path, *team_paths, *sorted(references.files)),
        document=document,
        team_documents=tuple(team_document for _, team_document in teams),
        warnings=_warnings(config, document),
        references=references,
    )


class _Reader:
    """Reads one file after the other and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._files: list[str] = []
        self._documents: dict[Path, Document] = {}

    def read(self, path: Path, model: type[M], references: References) -> tuple[M, Document] | None:
        """The file's settings; None, and problems, when they are wrong."""
        self._files.append(str(path))
        try:
            document, problems = parse(str(path), read(path))
        except ConfigError as error:
            self.problems += error.problems
            return None
        self._documents[path] = document
        self.problems += problems
        try:
            return model.model_validate(document.value, context=references), document
        except ValidationError as error:
            self.problems += [
                document.problem(each.keys, each.message, at_key=each.at_key)
                for each in explain(error, model, document.value, _where_it_goes)
            ]
            return None

    def team_paths(self, path: Path) -> list[Path]:
        """The team files that the configuration at `path` names, as far as it could be read."""
        document = self._documents.get(path)
        if document is None or not isinstance(document.value, dict):
            return []
        pattern = document.value.get("teams")
        if not isinstance(pattern, str):
            return []
        names = [] if "\0" in pattern else glob.glob(pattern, root_dir=path.parent)
        found = [path.parent / name for name in sorted(names)]
        if not found:
            self.problems.append(document.problem(("teams",), "no file matches: nobody could call"))
        return found

    def in_order(self) -> list[Problem]:
        """The problems in the order of the files and of their lines."""
        order = {file: index for index, file in enumerate(self._files)}
        return sorted(self.problems, key=lambda each: (order[each.file], each.line, each.column))


def _where_it_goes(keys: Keys) -> str:
    """A hint for the key of a filter that stands at the top, in a model or in a chain."""
    may_be_a_filter = len(keys) == 1 or keys[0] in ("models", "chains")
    return where_settings_go(str(keys[-1])) if may_be_a_filter else ""


def _warnings(config: Config, document: Document) -> list[str]:
    warnings = [
        document.problem(
            ("upstreams", name, "tls", "insecure_skip_verify"),
            "the upstream's certificate is not verified: anyone on the way can read and answer",
        )
        for name, upstream in config.upstreams.items()
        if upstream.tls.insecure_skip_verify
    ]
    warnings += [
        document.problem(
            ("models", name), "only the first target is used, unless a filter chooses another"
        )
        for name, model in config.models.items()
        if len(model.targets) > 1
    ]
    return [str(warning) for warning in warnings]
