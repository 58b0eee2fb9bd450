"""A value that must not be shown."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Self

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import core_schema

from sidecar.config.references import HOW_TO, References

HIDDEN = "***"


class Secret:
    """A secret with the reference it came from, such as `env:OPENAI_API_KEY`.

    `reveal()` is the only way to its value: `repr`, `str`, JSON and pickling show `***`. A field
    of this type takes a reference and resolves it through the validation's `References`.
    """

    __slots__ = ("__value", "reference")

    def __init__(self, value: str, reference: str = "") -> None:
        self.__value = value
        self.reference = reference

    @classmethod
    def refer(cls, reference: str, references: References) -> Self:
        """The secret that `reference` names. Raises ValueError with the fix."""
        return cls(references.secret(reference), reference)

    def reveal(self) -> str:
        return self.__value

    def sha256(self) -> str:
        """Hex SHA-256 of the value; the value itself when it was given as `sha256:HEX`."""
        if self.reference.startswith("sha256:"):
            return self.__value
        return hashlib.sha256(self.__value.encode()).hexdigest()

    def __repr__(self) -> str:
        return HIDDEN

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(self.__value)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Secret], tuple[str, str]]:
        return (Secret, (HIDDEN, self.reference))

    @classmethod
    def _validate(cls, value: Any, info: ValidationInfo) -> Secret:
        if isinstance(value, Secret):
            return value
        if not isinstance(value, str) or not isinstance(info.context, References):
            raise ValueError(HOW_TO)
        return cls.refer(value, info.context)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(
            cls._validate,
            json_schema_input_schema=core_schema.str_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(
                str, when_used="json", return_schema=core_schema.str_schema()
            ),
        )


class TeamKey(Secret):
    """What a team's clients send as API key. `sha256:HEX` will do: only the digest is compared."""

    __slots__ = ()

    @classmethod
    def refer(cls, reference: str, references: References) -> Self:
        if not reference.startswith("sha256:"):
            return super().refer(reference, references)
        digest = reference.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError("write sha256: and the 64 hex digits of the key's SHA-256")
        return cls(digest, f"sha256:{digest[:8]}…")
