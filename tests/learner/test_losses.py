import math

import pytest
import torch

from learner.losses import TokenBatch, k3, policy_loss
from services.config.tree import LossConfig


def tokens(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(count, generator=generator)

    behaviour = -normal().abs()
    return TokenBatch(
        logprob=(behaviour + normal(0.4)).requires_grad_(),
        behaviour=behaviour,
        advantage=normal(),
        weight=(normal() > -1).float(),
        old=behaviour + normal(0.6),
        reference=behaviour + normal(0.5),
        entropy=normal().abs().requires_grad_(),
    )


def naive(batch, config, total):
    """The docstring's formula, a token at a time."""
    loss = torch.zeros(())
    for t in range(len(batch.logprob)):
        old = batch.behaviour[t] if config.importance_cap is None else batch.old[t]
        ratio, advantage = torch.exp(batch.logprob[t] - old), batch.advantage[t]
        bounded = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
        objective = torch.min(ratio * advantage, bounded * advantage)
        if config.dual_clip is not None and advantage < 0:
            objective = torch.max(objective, config.dual_clip * advantage)
        if config.importance_cap is not None:
            objective = objective * min(math.exp(old - batch.behaviour[t]), config.importance_cap)
        gap = batch.reference[t] - batch.logprob[t]
        kl = torch.exp(gap) - gap - 1
        token_loss = -objective + config.kl_coef * kl - config.entropy_coef * batch.entropy[t]
        loss = loss + batch.weight[t] * token_loss / total
    return loss


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(kl_coef=0.01, importance_cap=2.0),
        LossConfig(kl_coef=0.3, importance_cap=1.0, clip_low=0.1, clip_high=0.3, dual_clip=1.5, entropy_coef=0.2),
        LossConfig(kl_coef=0.1, importance_cap=None, entropy_coef=0.1),
    ],
)
def test_loss_and_gradient_are_the_formula(config):
    ours, theirs = tokens(), tokens()
    if config.importance_cap is None:
        object.__setattr__(ours, "old", None)
    loss, expected = policy_loss(ours, config, 57).loss, naive(theirs, config, 57)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.logprob.grad, theirs.logprob.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.entropy.grad, theirs.entropy.grad, rtol=1e-5, atol=1e-6)


def test_metrics_are_weighted_sums():
    batch = tokens()
    sums = policy_loss(batch, LossConfig(kl_coef=0.1), 1).sums
    ratio = torch.exp(batch.logprob - batch.old)
    outside = ((ratio > 1.2) & (batch.advantage > 0)) | ((ratio < 0.8) & (batch.advantage < 0))
    assert sums["tokens"] == batch.weight.sum()
    torch.testing.assert_close(sums["ratio"], (batch.weight * ratio).sum())
    torch.testing.assert_close(sums["clip_fraction"], (batch.weight * outside).sum())
    torch.testing.assert_close(sums["logprob_gap"], (batch.weight * (batch.logprob - batch.behaviour).abs()).sum())
    torch.testing.assert_close(sums["entropy"], (batch.weight * batch.entropy).sum())


def test_k3_is_the_kl_divergence_on_average():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def test_extreme_ratios_stay_finite():
    batch = TokenBatch(
        logprob=torch.tensor([-1e-3, -300.0], requires_grad=True),
        behaviour=torch.tensor([-300.0, -1e-3]),
        advantage=torch.tensor([-1.0, 1.0]),
        weight=torch.ones(2),
        reference=torch.tensor([-300.0, -1e-3]),
    )
    loss = policy_loss(batch, LossConfig(kl_coef=0.1, importance_cap=None), 2).loss
    loss.backward()
    assert loss.isfinite()
    assert batch.logprob.grad.isfinite().all()


def test_kl_needs_reference():
    batch = tokens()
    object.__setattr__(batch, "reference", None)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(batch, LossConfig(kl_coef=0.1), 1)
