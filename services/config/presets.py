"""Presets: the defaults of other fields that an algorithm sets besides its advantage estimator, as in its paper.

Invariants
- A preset changes only defaults: a field that the recipe or the command line sets keeps that value.
- Only this module and the registry of estimators know algorithms by name: everything that a preset sets can also be set
  field by field. A plug-in has no preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel

from services.config.references import Choice

ALGORITHMS = ("gigpo", "grpo", "rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo", "hgpo", "graphgpo", "g2po")
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
        "graphgpo": {"advantage": {"gamma": 0.1, "similarity_of": "graph"}},
    }
)
"""Default by algorithm, section and field. An algorithm that is not listed sets nothing."""


def with_preset(tree: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration's tree with the preset of its algorithm as defaults for what the tree does not set."""
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
