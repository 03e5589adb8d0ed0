"""Sections of the configuration tree that say what an update optimises: the advantages and the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.references import Choice
from services.config.section import Fraction, Params, Section


class AdvantageConfig(Section):
    gamma: Fraction = 0.95
    """Discount of step returns."""
    omega: float = Field(1.0, ge=0)
    """Weight of the step-level advantage (GiGPO)."""
    normalisation: Literal["std", "mean"] = "std"
    """Divide centred values by the standard deviation (ddof 1, + 1e-6), or by 1."""
    episode_statistics: Literal["steps", "trajectories"] = "steps"
    """Mean and deviation of episode scores over the group's step rows, each with its own penalty (published code), or
    over its trajectories without penalties (paper)."""
    invalid_action_penalty: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Subtracted from an invalid step's score and return, after discounting; see `penalty`."""
    penalty: Literal["scaled", "unscaled"] = "scaled"
    """`scaled`: the penalty is subtracted before normalisation and divided by the deviation, which it is a part of
    (published code). `unscaled`: it is subtracted from the normalised advantage, once, in units of the advantage."""
    ignore_cut_responses: bool = False
    """Train on no token of the responses that `model.max_response_tokens` cut off: advantage 0, and no other term of
    the loss. What their loss is divided by stays as it is."""
    similarity: float | None = Field(None, gt=0, le=1)
    """Group anchors whose SequenceMatcher ratio reaches this; none: exact keys."""
    history: int = Field(2, ge=0)
    """HGPO: most earlier states that the steps of a group agree on; the paper takes `prompt.history_length`."""
    history_power: float = Field(1.0, ge=0)
    """HGPO: a group that agrees on k earlier states has weight (k + 1) ** history_power."""
    group_baseline: bool = False
    """REINFORCE++: subtract the group's mean score before normalising over the batch (REINFORCE++-baseline)."""
    params: Params = Field(default_factory=dict)
    """Parameters of an estimator that is a plug-in, as in `advantage.params.alpha=0.5`."""


class LossConfig(Section):
    function: Annotated[str, Choice(("ppo",))] = "ppo"
    """The loss of each token: PPO's clipped objective, or a plug-in (`module:name`, `./file.py:name`) in its place.
    Aggregation, KL and entropy are the same for both."""
    params: Params = Field(default_factory=dict)
    """Parameters of a loss that is a plug-in, as in `loss.params.beta=0.1`."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens; over each response's tokens, then over responses; or each response's sum over a constant,
    then over responses. A response is one step's."""
    constant_tokens: int | None = Field(None, ge=1)
    """The constant of `aggregation: constant`; none: `model.max_response_tokens`."""
    ratio: Literal["token", "sequence"] = "token"
    """The PPO ratio of each token, or of the response: the geometric mean of its tokens' (GSPO)."""
    clip_low: float = Field(0.2, ge=0)
    """PPO clip: ratio ≥ 1 − clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """PPO clip: ratio ≤ 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Lower bound −dual_clip·|A| of the objective for negative advantages; none: off."""
    kl_coef: float = Field(0.01, ge=0)
    """Weight of the KL divergence to the reference policy; 0 keeps no reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of the divergence at a sampled token: d, d²/2, or e^−d + d − 1, with d = log π − log π_ref."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or a penalty on each token that lowers the advantage of the response's tokens up to it."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Cap of the truncated importance weight π_old/μ of stale data (1e9 truncates nothing: decoupled PPO); none:
    π_old = μ, without a forward pass for it."""
    importance: Literal["token", "sequence"] = "token"
    """The importance weight π_old/μ of each token, or of the whole response: the product of its tokens'."""
    mask_beyond: float | None = Field(None, gt=1)
    """Leave out what has a weight π_old/μ above this or below its inverse; none: nothing."""
    mask: Literal["token", "sequence"] = "token"
    """What `mask_beyond` looks at and leaves out: tokens, or responses by the product of their tokens' weights."""
    drop_zero_advantage: bool = True
    """Leave out rows whose advantage is 0 when no other loss term needs them; the gradient is the same."""

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether rows of advantage 0 can be left out: PPO's objective is 0 there; of a plug-in nothing is known."""
        return self.drop_zero_advantage and self.function == "ppo" and self.kl_coef == 0 and self.entropy_coef == 0

    @model_validator(mode="after")
    def _mask_needs_weights(self) -> LossConfig:
        if self.mask_beyond is not None and self.importance_cap is None:
            raise ValueError("loss.mask_beyond needs loss.importance_cap: without it there is no weight π_old/μ")
        return self
