"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent conversion of text to numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def or_also(*alternatives: dict[str, Any]) -> Any:
    """Tell the JSON schema about the short forms that a field also takes."""

    def widen(schema: dict[str, Any]) -> None:
        full = dict(schema)
        schema.clear()
        schema["anyOf"] = [full, *alternatives]

    return Field(json_schema_extra=widen)
