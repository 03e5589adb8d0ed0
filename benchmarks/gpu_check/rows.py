"""The result of a check, and how a value becomes a verdict.

Invariants
- A value that is not a number (NaN) is within no bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "measured", "failed", "skipped"]
Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        name: what was checked, with the unit of the value.
        value: what was found; None: nothing.
        verdict: `ok`: within its bound. `measured`: a figure without a bound. `failed`, `skipped`: see `reason`.
        reason: the bound; or what is wrong; or why the check did not run.
    """

    name: str
    value: Value
    verdict: Verdict
    reason: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def measured(name: str, value: Value) -> Row:
    return Row(name, value, "measured")


def skipped(name: str, reason: str) -> Row:
    return Row(name, None, "skipped", reason)


def failed(name: str, reason: str, value: Value = None) -> Row:
    return Row(name, value, "failed", reason)


def holds(name: str, value: Value, good: bool, reason: str) -> Row:
    """`ok` if `good`; `reason` says what is required."""
    return Row(name, value, "ok" if good else "failed", reason)


def at_most(name: str, value: float, bound: float) -> Row:
    return holds(name, value, value <= bound, f"at most {bound:.3g}")


def at_least(name: str, value: float, bound: float) -> Row:
    return holds(name, value, value >= bound, f"at least {bound:.3g}")


def between(name: str, value: float, low: float, high: float) -> Row:
    return holds(name, value, low <= value <= high, f"{low:.3g} to {high:.3g}")
