"""Request bodies of the API: actions. Everything else is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from services.buffer.commands import Action


def _whole(value: object) -> object:
    """The integer of a float such as 3.0, which is an integer in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class PlainAction(BaseModel):
    """An action without parameters."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    action: Literal[Action.PAUSE, Action.RESUME, Action.CHECKPOINT, Action.EVALUATE, Action.STOP]


class ScaleAction(BaseModel):
    """Set the requested number of rollout actors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    action: Literal[Action.SCALE]
    actors: Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, le=10_000)]


ActionRequest = Annotated[PlainAction | ScaleAction, Field(discriminator="action")]
