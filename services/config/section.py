"""Base of every section of the configuration tree: frozen, documented field by field, unknown keys invalid.

Invariants
- Every number is finite, with an absolute value of at most 2³¹ − 1, so that it fits everywhere it is used.
- Booleans are not accepted as numbers.
- No text or path contains a null character, which file names, environment variables and command lines cannot contain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

LARGEST = 2**31 - 1
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
"""A time limit, in seconds, of at most a year: the functions that wait accept no longer ones."""
Temperature = Annotated[float, Field(ge=0.01, le=2)]
"""Sampling temperature. vLLM rejects a higher one, and raises a lower one to 0.01, so that its log-probabilities would
differ from the learner's."""
PlayTemperature = Annotated[float, Field(ge=0, le=2)]
"""Sampling temperature where nothing is trained on what is sampled; 0: always the most likely token."""


def _plain(value: object) -> object:
    """Reject values that JSON would change on their way to another process."""
    match value:
        case Mapping():
            for inner in value.values():
                _plain(inner)
        case list() | tuple():
            for inner in value:
                _plain(inner)
        case float() if not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        case str() if "\0" in value:
            raise ValueError("must not contain a null character")
    return value


Params = Annotated[dict[str, JsonValue], AfterValidator(_plain)]
"""Parameters of a plug-in: plain data, validated by the plug-in itself."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"must not be {str(value).lower()}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and abs(part) > LARGEST:
                raise ValueError(f"must be at most {LARGEST:,}, got {part:g}")
            if isinstance(part, str | Path) and "\0" in str(part):
                raise ValueError("must not contain a null character")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or isinstance(annotation, bool) or any(map(_takes_bool, get_args(annotation)))
