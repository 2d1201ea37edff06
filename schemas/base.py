"""What all contracts have in common."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PositiveInt,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


Regex = Annotated[NonEmpty, AfterValidator(_compiles)]
Dtype = Literal["float32", "float16", "bfloat16"]


class Contract(BaseModel):
    """A frozen record that refuses unknown fields and does not convert between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse and check a JSON text."""
        return cls.model_validate_json(text)

    def to_json(self) -> str:
        """Write as JSON, indented, with a final newline; the same record always gives the same bytes."""
        return self.model_dump_json(indent=1) + "\n"


class Without(Contract):
    """A record whose newer fields are left out where they say nothing, so that earlier readers can read it."""

    without: ClassVar[dict[str, Any]]
    """Those fields, and the value that says nothing."""

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            key: value for key, value in handler(self).items() if key not in self.without or value != self.without[key]
        }


class StageConfig(Contract):
    """What every stage has."""

    stage: str
    """Name of the stage, under which its package registers it."""
    corpus: Name = "main"
    """Which corpus of the run the stage works on; `main` is the run folder itself, others are folders in it."""

    @property
    def reads(self) -> str:
        """The corpus that holds what the stage needs."""
        return self.corpus


class AnalysisConfig(StageConfig):
    """What every analysis has: a stage that reads a store and gives a result."""

    name: Name | None = None
    """Name of the result; by default that of the stage."""
    block_bytes: PositiveInt = 256 * 2**20
    """Memory that one block of rows may take while it is computed, in bytes."""
