"""Tables as plain rows, which become data frames where pandas or Polars is installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from services.errors import AnchorageError

if TYPE_CHECKING:
    import pandas
    import polars


class FramesUnavailable(AnchorageError):
    """The library for data frames that was asked for is not installed."""


class Rows(list[dict[str, Any]]):
    """A list of rows, each a dict from column to value. Rows may lack columns that others have.

    Example:
        run.metrics()[-1]["rollout/success_rate"]
        run.metrics().column("rollout/success_rate")
        run.metrics().to_pandas().plot(x="step", y="rollout/success_rate")
    """

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order of first appearance."""
        return list(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[Any]:
        """Return the values of a column, None where a row lacks it."""
        return [row.get(name) for row in self]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a pandas DataFrame; a missing value is NaN or None.

        Raises:
            FramesUnavailable: pandas is not installed.
        """
        return _library("pandas").DataFrame(list(self), columns=self.columns)

    def to_polars(self) -> polars.DataFrame:
        """Return a Polars DataFrame; a missing value is null.

        Raises:
            FramesUnavailable: Polars is not installed.
        """
        columns = {name: self.column(name) for name in self.columns}
        return _library("polars").DataFrame(columns, strict=False)

    def frame(self, library: Literal["pandas", "polars"] = "pandas") -> Any:
        """Return a data frame of the library of that name; see `to_pandas` and `to_polars`."""
        return self.to_polars() if library == "polars" else self.to_pandas()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise FramesUnavailable(
            f"{name} is not installed: pip install {name}, or use the rows as they are (a list of dicts)"
        ) from None
