"""The policy loss of an update, over a flat list of response tokens.

    r = π(a) / π_old(a)                                                 or the geometric mean over the response (GSPO)
    L = − w · m · min(r · A, clip(r, 1 − clip_low, 1 + clip_high) · A)  PPO
        + kl_coef · k(π, π_ref)                                         estimate of KL(π ‖ π_ref), see `divergence`
        − entropy_coef · H(π)

Three policies: μ sampled the token (behaviour), π_old is the learner's at the start of the update (proximal), π is
being trained. w = min(π_old/μ, cap) and the mask m (0 where π_old/μ is far from 1) correct for μ ≠ π_old, by token or
by response. For negative A, dual clip bounds the objective below by dual_clip · A. With KL in the reward,
A is lowered by kl_coef · Σ k(π_old, π_ref) over the token and those after it in the response.

The first line is the loss function, `ppo` or a plug-in (`loss.function`): from a `TokenBatch` to one loss a token. The
rest is the same for all of them. Token losses are aggregated with one denominator for the whole optimizer step
(`denominator`), so that ranks, micro-batches and packing do not matter.

Invariants
- Nothing here knows prompts or padding: tokens that must not count are not in the list, or have weight 0.
- A response is never cut: its tokens stand together and in order in one micro-batch, with one number in `sequence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor

from services.config.tree import LossConfig
from services.errors import AnchorageError
from services.plugins import Plugin, PluginError, load

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here: e^20 is far outside of every clip, and float32 overflows at e^88."""


class BatchIncomplete(AnchorageError, ValueError):
    """Something that the configuration needs is not in the batch."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the loss reads of T response tokens; float32 [T] each but `sequence`.

    Attributes:
        logprob: log π of the sampled token, with gradient.
        behaviour: log μ, as the sampler reported it.
        advantage: of the token's step.
        weight: 1, or 0 for tokens that only fill a batch.
        fresh: 1 for tokens that π itself sampled, else 0: there |log π − log μ| should be 0; None: not known.
        old: log π_old; None: π_old = μ.
        reference: log π_ref; only read when kl_coef > 0.
        entropy: H(π) at the token's position, with gradient when entropy_coef > 0.
        sequence: int64 [T], number of the token's response in the batch, from 0; only read by what works on responses.
    """

    logprob: Tensor
    behaviour: Tensor
    advantage: Tensor
    weight: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None
    sequence: Tensor | None = None
    fresh: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What a loss function returns; a tensor alone stands for `loss`.

    Attributes:
        loss: float [T], with gradient; nothing in it is weighted, summed or divided yet.
        metrics: float [T] each, to be averaged over tokens and recorded as `loss/NAME`.
        peaks: names of metrics whose largest value is recorded too, as `loss/NAME_max`.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    peaks: Sequence[str] = ()


LossFunction = Callable[[TokenBatch, LossConfig], TokenLosses | Tensor]

LOSSES: Mapping[str, str] = MappingProxyType({"ppo": "learner.rank.losses:ppo"})
"""Names that `loss.function` may have instead of `module:name`."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of one micro-batch, and its metrics as weighted token sums and as maxima.

    Divide each sum by `sums["tokens"]` after adding up micro-batches and ranks.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


def denominator(config: LossConfig, tokens: int, responses: int, max_response_tokens: int) -> float:
    """What `policy_loss` divides by: response tokens and responses are those of the whole optimizer step."""
    if config.aggregation == "token":
        return tokens
    if config.aggregation == "sequence":
        return responses
    return responses * (config.constant_tokens or max_response_tokens)


def policy_loss(batch: TokenBatch, config: LossConfig, total: float, function: LossFunction | None = None) -> LossTerms:
    """Aggregated token losses over `total`, the step's `denominator`.

    `function`: the loaded `config.function`; None: it is loaded here.

    Raises:
        BatchIncomplete: something that the configuration needs is not in the batch.
        PluginError: the function raises, or returns anything but one loss a token.
    """
    old = batch.behaviour if batch.old is None else batch.old
    kl = _reference_kl(batch, old, config)
    if kl is not None and config.kl_in == "reward":
        lowered = batch.advantage - config.kl_coef * _sum_to_go(kl, _sequence(batch))
        batch = replace(batch, advantage=lowered)
    found = (function or load_loss(config))(batch, config)
    own = found if isinstance(found, TokenLosses) else TokenLosses(found)
    token_loss = own.loss
    if kl is not None and config.kl_in == "loss":
        token_loss = token_loss + config.kl_coef * kl
    if batch.entropy is not None:
        token_loss = token_loss - config.entropy_coef * batch.entropy
    current = batch.logprob.detach()
    gap = ((current if batch.old is None else old) - batch.behaviour).abs()
    metrics = {
        **own.metrics,
        "logprob_gap": gap,
        **({} if batch.fresh is None else {"fresh_gap": batch.fresh * gap, "fresh_fraction": batch.fresh}),
        # The tokens come from μ: an estimate of KL(μ ‖ π_old), the sampler's distance from the learner.
        "sampler_kl": divergence(batch.behaviour, current if batch.old is None else old, "k3"),
        **({} if kl is None else {"kl": kl}),
        **({} if batch.entropy is None else {"entropy": batch.entropy}),
    }
    sums = {name: (batch.weight * value.detach()).sum() for name, value in metrics.items()}
    maxima = {name: (batch.weight * metrics[name].detach()).max() for name in own.peaks}
    loss = (_aggregation_weights(batch, config) * token_loss).sum() / total
    return LossTerms(loss=loss, sums=sums | {"tokens": batch.weight.sum()}, maxima=maxima)


def load_loss(config: LossConfig) -> LossFunction:
    """The run's loss function, with its parameters filled in and its result checked.

    Raises:
        PluginError: see `services.plugins.load`.
    """
    plugin = load(
        "loss.function",
        config.function,
        built_in=LOSSES,
        arguments=("batch", "config"),
        params=config.params,
        params_key="loss.params",
    )

    def checked(batch: TokenBatch, config: LossConfig) -> TokenLosses:
        found = plugin.call(batch, config)
        losses = found if isinstance(found, TokenLosses) else TokenLosses(found)
        for name, values in {"its loss": losses.loss, **losses.metrics}.items():
            _require_tokens(plugin, name, values, batch)
        if lacking := [name for name in losses.peaks if name not in losses.metrics]:
            raise PluginError(f"{plugin.label}: peaks names {lacking[0]!r}, which is none of its metrics")
        return losses

    return checked


def _require_tokens(plugin: Plugin, name: str, values: object, batch: TokenBatch) -> None:
    if not isinstance(values, Tensor):
        raise PluginError(f"{plugin.label}: {name} must be a tensor, got {type(values).__name__}")
    if values.shape != batch.logprob.shape:
        raise PluginError(
            f"{plugin.label}: {name} must have one value for each of {len(batch.logprob)} tokens, got the shape "
            f"{list(values.shape)}"
        )


def check(config: LossConfig) -> Iterator[str]:
    """What is wrong with the run's loss function, one line each: it is loaded and used on a small batch."""
    label = f"loss.function={config.function}"
    batch = _synthetic_batch(config)
    before = {
        part.name: value.detach().clone() for part in fields(batch) if (value := getattr(batch, part.name)) is not None
    }
    try:
        found = load_loss(config)(batch, config)
    except AnchorageError as error:
        yield from str(error).splitlines()
        return
    loss = (found.loss if isinstance(found, TokenLosses) else found).sum()
    for name, value in before.items():
        if not torch.equal(value, getattr(batch, name)):
            yield f"{label}: it changes batch.{name}; copy it first"
    if not loss.isfinite():
        yield f"{label}: its loss is {float(loss.detach())} for 9 ordinary tokens"
    elif not loss.requires_grad:
        yield f"{label}: its loss has no gradient: it must depend on batch.logprob"
    else:
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = batch.logprob.grad
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            yield f"{label}: the gradient of its loss by batch.logprob is missing, 0 everywhere or not finite"


def _synthetic_batch(config: LossConfig) -> TokenBatch:
    """9 tokens of 3 responses, advantages of both signs, π a little away from π_old and that from μ."""
    behaviour = -torch.linspace(0.1, 2.0, 9)
    old = behaviour + torch.tensor([0.02, -0.03, 0.01] * 3)
    return TokenBatch(
        logprob=(old + torch.tensor([0.05, 0.04, -0.06] * 3)).requires_grad_(),
        behaviour=behaviour,
        advantage=torch.tensor([1.0, -0.5, 2.0]).repeat_interleave(3),
        weight=torch.ones(9),
        old=None if config.importance_cap is None else old,
        reference=old - 0.1 if config.kl_coef > 0 else None,
        entropy=torch.full((9,), 0.7),
        sequence=torch.arange(3).repeat_interleave(3),
        fresh=torch.ones(9),
    )


def ppo(batch: TokenBatch, config: LossConfig) -> TokenLosses:
    """PPO's clipped objective, corrected for what the sampler was: the first line of the module's formula."""
    old = batch.behaviour if batch.old is None else batch.old
    ratio = _ratio(batch, old, config)
    objective, clipped = _clipped_objective(ratio, batch.advantage, config)
    correction, corrected = _correction(batch, config)
    metrics = {"ratio": ratio, "clip_fraction": clipped, **corrected}
    return TokenLosses(-correction * objective, metrics, ("ratio", *({"importance"} & corrected.keys())))


def divergence(logprob: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Schulman's estimates of KL(π ‖ π_ref) at tokens sampled from π, with d = log π − log π_ref.

    k1 = d is unbiased, and as a term of the loss without use (its gradient is 0 on average); k2 = d²/2 has the
    gradient of the divergence; k3 = e^−d + d − 1 is unbiased and never negative.
    """
    return _ESTIMATORS[estimator]((logprob - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


_ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"k1": lambda d: d, "k2": lambda d: d.square() / 2, "k3": lambda d: (-d).exp() + d - 1.0}
)


def _reference_kl(batch: TokenBatch, old: Tensor, config: LossConfig) -> Tensor | None:
    """Divergence from the reference policy at each token: of π where it is a loss, of π_old where it is a reward."""
    if config.kl_coef == 0:
        return None
    if batch.reference is None:
        raise BatchIncomplete("loss.kl_coef > 0 needs the reference policy's log-probabilities")
    return divergence(batch.logprob if config.kl_in == "loss" else old, batch.reference, config.kl_estimator)


def _ratio(batch: TokenBatch, old: Tensor, config: LossConfig) -> Tensor:
    log_ratio = batch.logprob - old
    if config.ratio == "sequence":
        sequence = _sequence(batch)
        lengths = _per_sequence(batch.weight, sequence).clamp(min=1.0)
        log_ratio = _per_sequence(batch.weight * log_ratio, sequence) / lengths
    return _bounded_exp(log_ratio)


def _clipped_objective(ratio: Tensor, advantage: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """PPO's objective of each token, and whether the clip binds (1 or 0)."""
    free = ratio * advantage
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantage
    objective = torch.minimum(free, bounded)
    clipped = (bounded < free).to(ratio.dtype)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantage
        objective = torch.where(advantage < 0, torch.maximum(objective, floor), objective)
    return objective, clipped


def _correction(batch: TokenBatch, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Factor of each token's objective for μ ≠ π_old, and its metrics; 1 and none where π_old = μ by definition."""
    if batch.old is None or config.importance_cap is None:
        return torch.ones_like(batch.weight), {}
    log_weights = {"token": batch.old - batch.behaviour}
    if "sequence" in (config.importance, config.mask):
        log_weights["sequence"] = _per_sequence(batch.weight * log_weights["token"], _sequence(batch))
    importance = _bounded_exp(log_weights[config.importance])
    factor = importance.clamp(max=config.importance_cap)
    if config.mask_beyond is None:
        return factor, {"importance": importance}
    judged = _bounded_exp(log_weights[config.mask])
    masked = ((judged > config.mask_beyond) | (judged < 1.0 / config.mask_beyond)).to(factor.dtype)
    return factor * (1.0 - masked), {"importance": importance, "masked_fraction": masked}


def _aggregation_weights(batch: TokenBatch, config: LossConfig) -> Tensor:
    """Weight of each token's loss before the division by the step's denominator; [T]."""
    if config.aggregation != "sequence":
        return batch.weight
    return batch.weight / _per_sequence(batch.weight, _sequence(batch)).clamp(min=1.0)


def _per_sequence(values: Tensor, sequence: Tensor) -> Tensor:
    """The sum over each token's sequence, at each of its tokens; [T]."""
    # No more sequences than tokens.
    return torch.zeros_like(values).index_add(0, sequence, values)[sequence]


def _sum_to_go(values: Tensor, sequence: Tensor) -> Tensor:
    """The sum over each token and those after it in its sequence; [T]."""
    order = sequence.argsort(stable=True)
    ordered, numbers = values[order].double(), sequence[order]
    ends = torch.zeros_like(ordered).index_add(0, numbers, ordered).cumsum(0)[numbers]
    return torch.empty_like(values).index_copy(0, order, (ends - ordered.cumsum(0) + ordered).to(values.dtype))


def _sequence(batch: TokenBatch) -> Tensor:
    if batch.sequence is None:
        raise BatchIncomplete("this loss works on whole responses: it needs the number of each token's response")
    return batch.sequence


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
