"""What an algorithm sets beyond its advantage estimator: defaults of other fields, as its paper has them.

Invariants
- A preset only changes defaults: a field that the recipe or the command line names keeps the value given there.
- Nothing else knows an algorithm by its name but the registry of estimators: what a preset does can be done, or undone,
  field by field. A plug-in has no preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel

from services.config.references import Choice

ALGORITHMS = ("gigpo", "grpo", "rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo", "hgpo")
"""Built-in advantage estimators."""
Algorithm = Annotated[str, Choice(ALGORITHMS)]

PRESETS: Mapping[str, Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "reinforce_pp": {"loss": {"kl_estimator": "k1", "kl_in": "reward"}},
        "dr_grpo": {"advantage": {"normalisation": "mean"}, "loss": {"aggregation": "constant", "kl_coef": 0.0}},
        "dapo": {
            "loss": {"aggregation": "token", "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0},
            "learner": {"dynamic_sampling": True},
        },
        "gspo": {
            "loss": {
                "ratio": "sequence",
                "aggregation": "sequence",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
                "kl_coef": 0.0,
            }
        },
    }
)
"""Algorithm to section to field to default; an algorithm that is not here sets nothing."""


def with_preset(tree: Mapping[str, object]) -> dict[str, object]:
    """The tree of a configuration, with the preset of its algorithm below what is given."""
    algorithm = tree.get("algorithm")
    preset = PRESETS.get(algorithm, {}) if isinstance(algorithm, str) else {}
    merged = dict(tree)
    for section, defaults in preset.items():
        given = tree.get(section, {})
        if isinstance(given, BaseModel):
            given = given.model_dump(exclude_unset=True)
        if isinstance(given, Mapping):
            merged[section] = {**defaults, **given}
    return merged
