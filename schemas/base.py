"""What all contracts have in common."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


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
