"""Sections of the configuration tree that define what an update optimises: the advantages and the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.references import Choice
from services.config.section import Fraction, Params, Section


class AdvantageConfig(Section):
    gamma: Fraction = 0.95
    """Discount factor of step returns."""
    omega: float = Field(1.0, ge=0)
    """Weight of the step-level advantage (GiGPO, GraphGPO, G2PO)."""
    episode_weight: float = Field(1.0, ge=0)
    """GraphGPO: weight of the episode-level advantage."""
    normalisation: Literal["std", "mean"] = "std"
    """`std`: divide centred values by the standard deviation (ddof 1, plus 1e-6). `mean`: do not divide."""
    episode_statistics: Literal["steps", "trajectories"] = "steps"
    """What the mean and deviation of episode scores are computed over. `steps`: the group's step rows, each with its
    own penalty (published code). `trajectories`: the group's trajectories, without penalties (paper)."""
    invalid_action_penalty: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Subtracted from the score and the return of an invalid step, after discounting; see `penalty`."""
    penalty: Literal["scaled", "unscaled"] = "scaled"
    """`scaled`: subtract the penalty before normalisation, so that the deviation includes it and divides it (published
    code). `unscaled`: subtract it once from the normalised advantage, in units of the advantage."""
    ignore_cut_responses: bool = False
    """Do not train on responses that `model.max_response_tokens` cut off: their advantage and all other loss terms are
    0. The denominator of the loss does not change."""
    similarity: float | None = Field(None, gt=0, le=1)
    """Group anchors whose SequenceMatcher ratio is at least this. `null`: group only identical anchors."""
    similarity_of: Literal["step_groups", "graph"] = "step_groups"
    """What `similarity` merges. `step_groups`: the states in which steps are compared. `graph`: only the nodes of the
    graph in which GraphGPO measures distances; step groups stay exact."""
    history: int = Field(2, ge=0)
    """HGPO: maximum number of earlier states that the steps of a group have in common. The paper uses
    `prompt.history_length`."""
    history_power: float = Field(1.0, ge=0)
    """HGPO: exponent of the weight of a group with k earlier states in common: of k + 2, or of k + 1 with
    `history_form: paper`."""
    history_form: Literal["published", "paper"] = "published"
    """HGPO: `published`: the authors' code (deviation of the population, levels of advantage 0 left out). `paper`: as
    summaries of the paper have it (deviation with ddof 1, every level that holds another step counts)."""
    base_group: bool = False
    """HGPO: the episode's advantage joins the levels, with weight 1. Only with `history_form: published`."""
    goal_reward: float = Field(10.0, gt=0, le=1e6)
    """GraphGPO, G2PO: reward of a won episode; what the goal is worth. That of `env.success_reward`."""
    normalize_distance: bool = False
    """GraphGPO: the worth of a step depends on how far it came, not only on how far it is from the goal after it."""
    step_penalty: float | None = Field(None, ge=0, allow_inf_nan=False)
    """G2PO: subtracted at the step level from the value of an invalid step. `null`: `invalid_action_penalty`. The
    published code fixes it at 0.1."""
    group_baseline: bool = False
    """REINFORCE++: subtract the group's mean score before normalising over the batch (REINFORCE++-baseline)."""
    params: Params = Field(default_factory=dict)
    """Parameters of an estimator that is a plug-in, as in `advantage.params.alpha=0.5`."""

    @model_validator(mode="after")
    def _base_group_is_published(self) -> AdvantageConfig:
        if self.base_group and self.history_form != "published":
            raise ValueError("advantage.base_group: requires advantage.history_form=published")
        return self


class LossConfig(Section):
    function: Annotated[str, Choice(("ppo",))] = "ppo"
    """Loss of each token. `ppo`: PPO's clipped objective. A plug-in (`module:name`, `./file.py:name`) replaces it;
    aggregation, KL and entropy stay the same."""
    params: Params = Field(default_factory=dict)
    """Parameters of a loss that is a plug-in, as in `loss.params.beta=0.1`."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """`token`: mean over all tokens. `sequence`: mean over the tokens of each response, then over responses.
    `constant`: each response's sum divided by `constant_tokens`, then mean over responses. A response belongs to one
    step."""
    constant_tokens: int | None = Field(None, ge=1)
    """Divisor of `aggregation: constant`, in tokens. `null`: `model.max_response_tokens`."""
    ratio: Literal["token", "sequence"] = "token"
    """PPO ratio of each token (`token`), or of the whole response: the geometric mean of its tokens' ratios
    (`sequence`, GSPO)."""
    clip_low: float = Field(0.2, ge=0)
    """PPO clipping: lower bound 1 − clip_low of the ratio."""
    clip_high: float = Field(0.2, ge=0)
    """PPO clipping: upper bound 1 + clip_high of the ratio."""
    dual_clip: float | None = Field(None, gt=1)
    """Lower bound −dual_clip·|A| of the objective for negative advantages. `null`: no bound."""
    kl_coef: float = Field(0.01, ge=0)
    """Weight of the KL divergence to the reference policy. 0: no reference policy is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of the KL divergence at a sampled token, with d = log π − log π_ref. `k1`: d. `k2`: d²/2. `k3`: e^−d + d
    − 1."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`loss`: the KL divergence is a term of the loss. `reward`: it is a penalty on each token, which lowers the
    advantage of the response's tokens up to that one."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Maximum of the truncated importance weight π_old/μ of stale data (1e9: no truncation, decoupled PPO). `null`:
    assume π_old = μ, which saves a forward pass."""
    importance: Literal["token", "sequence"] = "token"
    """Importance weight π_old/μ of each token (`token`), or of the whole response: the product of its tokens' weights
    (`sequence`)."""
    mask_beyond: float | None = Field(None, gt=1)
    """Exclude data whose weight π_old/μ is above this or below its inverse. `null`: exclude nothing."""
    mask: Literal["token", "sequence"] = "token"
    """What `mask_beyond` tests and excludes: single tokens (`token`), or responses by the product of their tokens'
    weights (`sequence`)."""
    drop_zero_advantage: bool = True
    """Skip rows whose advantage is 0 if no other loss term needs them. The gradient is the same."""

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether rows of advantage 0 can be skipped. PPO's objective is 0 there; a plug-in's may not be."""
        return self.drop_zero_advantage and self.function == "ppo" and self.kl_coef == 0 and self.entropy_coef == 0

    @model_validator(mode="after")
    def _mask_needs_weights(self) -> LossConfig:
        if self.mask_beyond is not None and self.importance_cap is None:
            raise ValueError("loss.mask_beyond: requires loss.importance_cap, without which there is no weight π_old/μ")
        return self
