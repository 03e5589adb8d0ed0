"""Settings of the shop, read from environment variables: `WEBSHOP_` followed by the field's name in capitals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from env_servers.environment import BrokenTask
from env_servers.errors import summary
from env_servers.webshop.nouns import TaggerName
from env_servers.webshop.pages import Mode

PREFIX = "WEBSHOP_"
DATA_VARIABLE = f"{PREFIX}DATA"


class WebShopSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: Path | None = None
    """Folder of the official files. If unset, the catalogue is generated."""
    index: Path | None = None
    """Folder that stores the search index of a large catalogue. If unset, it is built in memory at every start."""
    products: int | None = Field(None, ge=1)
    """Number of products to sell, from the first. If unset, all."""
    goals: Literal["synthetic", "human"] = "synthetic"
    """Goals generated from the products' options, or crowd-written goals."""
    seed: int = 0
    """Seed of the prices and price limits."""
    observation: Mode = "text"
    """Form of the observations, as in the original: parts joined by [SEP], or lines with marked buttons."""
    attributes: bool = False
    """Whether item pages have an Attributes button."""
    reward: Literal["success", "score"] = "success"
    """`success`: 1 for a score of 1, otherwise 0. `score`: the score itself."""
    tagger: TaggerName = "auto"
    """Noun tagger of titles: spaCy's model, the stop words, or `auto`: the model if it is installed."""


def read_settings(variables: Mapping[str, str] = os.environ) -> WebShopSettings:
    """Return the settings given by the variables; an empty variable counts as unset.

    Raises:
        BrokenTask: a variable is invalid.
    """
    names = {name: f"{PREFIX}{name.upper()}" for name in WebShopSettings.model_fields}
    given = {name: variables[variable] for name, variable in names.items() if variables.get(variable)}
    try:
        return WebShopSettings.model_validate(given)
    except ValidationError as error:
        raise BrokenTask(f"invalid {PREFIX}… variable: {summary(error)}") from None
