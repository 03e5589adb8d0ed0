"""Settings of the shop, read from environment variables: `WEBSHOP_` and the field's name in capitals."""

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
    """Folder of the official files; none: a generated catalogue."""
    index: Path | None = None
    """Folder that keeps the search index, for large catalogues; none: it is made in memory at every start."""
    products: int | None = Field(None, ge=1)
    """Sell only the first so many products; none: all."""
    goals: Literal["synthetic", "human"] = "synthetic"
    """Goals made of the products' options, or crowd-written ones."""
    seed: int = 0
    """Seed of the prices and price limits."""
    observation: Mode = "text"
    """Text of the observations, as in the original: parts joined by [SEP], or lines with marked buttons."""
    attributes: bool = False
    """Item pages have an Attributes button."""
    reward: Literal["success", "score"] = "success"
    """1 for a score of 1 and 0 otherwise, or the score itself."""
    tagger: TaggerName = "auto"
    """What finds the nouns of titles: spaCy's model, the stop words, or the model where it is installed."""


def read_settings(variables: Mapping[str, str] = os.environ) -> WebShopSettings:
    """The settings that the variables name; an empty variable is as good as none.

    Raises:
        BrokenTask: a variable has an impossible value.
    """
    names = {name: f"{PREFIX}{name.upper()}" for name in WebShopSettings.model_fields}
    given = {name: variables[variable] for name, variable in names.items() if variables.get(variable)}
    try:
        return WebShopSettings.model_validate(given)
    except ValidationError as error:
        raise BrokenTask(f"a {PREFIX}… variable cannot be used: {summary(error)}") from None
