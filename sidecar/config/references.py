"""What a configuration refers to: secrets in the environment or in files, and other files.

Handed to pydantic as the validation context, so that every field of type `Secret` resolves its
reference wherever it stands, also in the settings of a filter nobody here knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

MIN_SECRET_CHARACTERS = 8
MAX_SECRET_BYTES = 64 * 1024
HOW_TO = "write env:NAME or file:PATH; a secret never stands in the file"
NO_PROGRAMS = "`exec:` is refused, a configuration never runs programs: write env:NAME or file:PATH"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]").search


class References:
    """Resolves the references of one file, whose relative paths start at `directory`.

    Every message is a fix and none ever holds a value.
    """

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self._environ = environ
        self._contents: dict[Path, str] = {}
        self._files: set[Path] = set()
        self.missing: dict[str, str] = {}
        """What is wrong with references that have a stand-in, by these; here none has."""

    def __reduce__(self) -> tuple[type[References], tuple[Path, Mapping[str, str]]]:
        return type(self), (self.directory, {})  # values are pickled no more than secrets are

    def at(self, directory: Path) -> References:
        """The same for a file in another directory; both remember what either has read."""
        other = type(self)(directory, self._environ)
        other._contents, other._files = self._contents, self._files
        other.missing = self.missing
        return other

    @property
    def files(self) -> frozenset[Path]:
        """All files that were asked for and are there."""
        return frozenset(self._files)

    def secret(self, reference: str) -> str:
        """The value of `env:NAME` or `file:PATH`. Raises ValueError with the fix."""
        scheme, _, name = reference.partition(":")
        if scheme == "env":
            value = self._from_environment(name)
            source = f"the environment variable {name}"
        elif scheme == "file" and name:
            value = self._from_file(name)
            source = f"the file {name}"
        elif scheme == "exec":
            raise ValueError(NO_PROGRAMS)
        else:
            raise ValueError(HOW_TO)
        if not value:
            raise ValueError(f"{source} is empty")
        if value != value.strip():
            raise ValueError(f"{source} has white space around the secret: remove it")
        if any("\ud800" <= each <= "\udfff" for each in value):  # bytes that Python kept as such
            raise ValueError(f"{source} is not UTF-8 text")
        if _CONTROL(value):
            raise ValueError(
                f"{source} has a line end or another control character inside the secret"
            )
        if len(value) < MIN_SECRET_CHARACTERS:
            raise ValueError(f"{source} has less than {MIN_SECRET_CHARACTERS} characters")
        return value

    def is_value(self, secret: str) -> bool:
        """Whether it is what a reference refers to, and not a stand-in."""
        return secret not in self.missing

    def file(self, path: str) -> str:
        """`path` as an absolute path. Raises ValueError when no regular file is there."""
        absolute = self._absolute(path)
        try:
            is_file, is_directory = absolute.is_file(), absolute.is_dir()
        except OSError as error:
            raise ValueError(f"{absolute} cannot be read: {error.strerror}") from None
        except ValueError:  # no possible path
            is_file = is_directory = False
        if is_directory:
            raise ValueError(f"{absolute} is a directory")
        if not is_file:
            raise ValueError(f"there is no file {absolute}")
        self._files.add(absolute)
        return str(absolute)

    def _absolute(self, path: str) -> Path:
        return (self.directory / path).absolute()

    def _from_environment(self, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(HOW_TO)
        try:
            return self._environ[name]
        except KeyError:
            raise ValueError(f"the environment variable {name} is not set") from None

    def _from_file(self, name: str) -> str:
        path = self._absolute(name)
        if path not in self._contents:
            self._contents[path] = self._read(path, name)
        return self._contents[path]

    def _read(self, path: Path, name: str) -> str:
        References.file(self, name)  # a pipe or a device would block the start
        try:
            with path.open("rb") as file:
                content = file.read(MAX_SECRET_BYTES + 1)
        except OSError as error:
            raise ValueError(f"the file {name} cannot be read: {error.strerror}") from None
        if len(content) > MAX_SECRET_BYTES:
            raise ValueError(f"the file {name} is larger than 64 KiB")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            pass
        else:
            return text.removesuffix("\n").removesuffix("\r")
        # Outside `except`, whose error would carry the content.
        raise ValueError(f"the file {name} is not UTF-8 text")


class PartialReferences(References):
    """For who needs hardly any secret: what cannot be resolved has a stand-in, and other files need
    not be there."""

    def secret(self, reference: str) -> str:
        try:
            return super().secret(reference)
        except ValueError as error:
            if str(error) in (HOW_TO, NO_PROGRAMS):  # no reference: nobody could resolve it
                raise
            # Two parts, of which each scheme of signing could make something; a different one for
            # each reference, as no two teams may have the same key.
            stand_in = f"missing.{sha256(reference.encode('utf-8', 'replace')).hexdigest()}"
            self.missing[stand_in] = str(error)
            return stand_in

    def file(self, path: str) -> str:
        return str(self._absolute(path))
