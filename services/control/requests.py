"""What the API is sent: actions. Nothing that the OpenAPI document does not allow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from services.buffer.commands import Action


def _whole(value: object) -> object:
    """JSON Schema's integers include 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class PlainAction(BaseModel):
    """Something to do with the run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    action: Literal[Action.PAUSE, Action.RESUME, Action.CHECKPOINT, Action.EVALUATE, Action.STOP]


class ScaleAction(BaseModel):
    """How many rollout actors are wanted."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    action: Literal[Action.SCALE]
    actors: Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, le=10_000)]


ActionRequest = Annotated[PlainAction | ScaleAction, Field(discriminator="action")]
