"""The loss and its gradient against a straightforward statement, a response and a token at a time."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from learner.batching import Row, plan
from learner.rank.losses import TokenBatch, denominator, divergence, policy_loss
from services.config.tree import LossConfig

LENGTHS = (3, 1, 4, 2)
LIMIT = 8


def tokens(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(sum(lengths), generator=generator)

    behaviour = -normal().abs()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return TokenBatch(
        logprob=(behaviour + normal(0.4)).requires_grad_(),
        behaviour=behaviour,
        advantage=torch.randn(len(lengths), generator=generator)[sequence],
        weight=torch.ones(sum(lengths)),
        old=behaviour + normal(0.5),
        reference=behaviour + normal(0.5),
        entropy=normal().abs().requires_grad_(),
        sequence=sequence,
    )


def naive(batch, config, lengths=LENGTHS):
    """The docstring's formula: a loop over responses and their tokens."""
    total = torch.zeros(())
    old = batch.behaviour if config.importance_cap is None else batch.old
    for i, length in enumerate(lengths):
        y = range(sum(lengths[:i]), sum(lengths[: i + 1]))
        weights = [math.exp(old[t] - batch.behaviour[t]) for t in y]
        ratios = [torch.exp(batch.logprob[t] - old[t]) for t in y]
        losses = []
        for n, t in enumerate(y):
            advantage, penalty = batch.advantage[t], 0.0
            if config.kl_in == "loss":
                penalty = config.kl_coef * naive_kl(batch.logprob[t] - batch.reference[t], config.kl_estimator)
            else:
                later = [naive_kl(old[s] - batch.reference[s], config.kl_estimator) for s in y if s >= t]
                advantage = advantage - config.kl_coef * sum(later)
            ratio = math.prod(ratios) ** (1 / length) if config.ratio == "sequence" else ratios[n]
            bounded = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
            objective = torch.min(ratio * advantage, bounded * advantage)
            if config.dual_clip is not None and advantage < 0:
                objective = torch.max(objective, config.dual_clip * advantage)
            if config.importance_cap is not None:
                weight = math.prod(weights) if config.importance == "sequence" else weights[n]
                judged = math.prod(weights) if config.mask == "sequence" else weights[n]
                objective = objective * min(weight, config.importance_cap)
                if config.mask_beyond is not None and not 1 / config.mask_beyond <= judged <= config.mask_beyond:
                    objective = 0 * objective
            losses.append(penalty - objective - config.entropy_coef * batch.entropy[t])
        share = {"token": sum(lengths), "sequence": length * len(lengths)}
        constant = (config.constant_tokens or LIMIT) * len(lengths)
        total = total + sum(losses) / share.get(config.aggregation, constant)
    return total


def naive_kl(d, estimator):
    return {"k1": d, "k2": d**2 / 2, "k3": math.e ** (-d) - 1 + d}[estimator]


CORRECTIONS = [
    {"importance_cap": None},
    {"importance_cap": 2.0},
    {"importance_cap": 1e9},
    {"importance_cap": 2.0, "importance": "sequence"},
    {"importance_cap": 1.5, "mask_beyond": 1.5},
    {"importance_cap": 1.5, "mask_beyond": 2.5, "mask": "sequence"},
    {"importance_cap": 1e9, "importance": "sequence", "mask_beyond": 1.7},
]
KINDS = [
    {"kl_coef": 0.3, "kl_estimator": e, "kl_in": where} for e in ("k1", "k2", "k3") for where in ("loss", "reward")
]
DIMENSIONS = [
    [{}, {"aggregation": "sequence"}, {"aggregation": "constant"}, {"aggregation": "constant", "constant_tokens": 5}],
    [{}, {"ratio": "sequence"}],
    [{"importance_cap": 2.0}, *CORRECTIONS],
    [{"kl_coef": 0.0}, *KINDS],
    [{}, {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "entropy_coef": 0.2}],
]
PLAIN = [options[0] for options in DIMENSIONS]
EVERY_OPTION = [[*PLAIN[:i], option, *PLAIN[i + 1 :]] for i, options in enumerate(DIMENSIONS) for option in options]
COMBINED = random.Random(0).sample(list(itertools.product(*DIMENSIONS)), 24)


def whole(config):
    return denominator(config, sum(LENGTHS), len(LENGTHS), LIMIT)


def as_configured(batch, config):
    return batch if config.importance_cap is not None else dataclasses.replace(batch, old=None)


def cut(batch, pieces):
    """Micro-batches of whole responses, their order and numbers changed, and one that only fills."""
    for numbers in pieces:
        places = torch.cat([torch.nonzero(batch.sequence == i)[:, 0] for i in numbers])
        fields = {
            field.name: getattr(batch, field.name)[places]
            for field in dataclasses.fields(batch)
            if getattr(batch, field.name) is not None
        }
        fields["sequence"] = torch.tensor([numbers.index(i) for i in fields["sequence"].tolist()])
        yield TokenBatch(**fields)
    yield TokenBatch(**fields | {"weight": torch.zeros(len(places))})


def test_loss_and_gradient_are_the_formula_for_every_option_and_every_split():
    for seed, parts in enumerate([*EVERY_OPTION, *COMBINED]):
        config = LossConfig(**{key: value for part in parts for key, value in part.items()})
        theirs = tokens(seed=seed)
        expected = naive(theirs, config)
        expected.backward()
        for pieces in ([[0, 1, 2, 3]], [[3, 0], [2, 1]]):
            ours = tokens(seed=seed)
            batches = cut(as_configured(ours, config), pieces)
            loss = sum(policy_loss(batch, config, whole(config)).loss for batch in batches)
            loss.backward()
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, msg=lambda m, c=config: f"{c}: {m}")
            torch.testing.assert_close(ours.logprob.grad, theirs.logprob.grad, rtol=1e-5, atol=1e-5)
            if config.entropy_coef > 0:
                torch.testing.assert_close(ours.entropy.grad, theirs.entropy.grad, rtol=1e-5, atol=1e-5)


def test_metrics_are_weighted_sums_and_maxima():
    batch = dataclasses.replace(tokens(), weight=(torch.arange(sum(LENGTHS)) % 3 > 0).float())
    terms = policy_loss(batch, LossConfig(kl_coef=0.1, importance_cap=1.2, mask_beyond=1.5), 1)
    sums, counted = terms.sums, batch.weight > 0
    ratio, weight = torch.exp(batch.logprob - batch.old), torch.exp(batch.old - batch.behaviour)
    outside = ((ratio > 1.2) & (batch.advantage > 0)) | ((ratio < 0.8) & (batch.advantage < 0))
    assert sums["tokens"] == batch.weight.sum()
    torch.testing.assert_close(sums["ratio"], ratio[counted].sum())
    torch.testing.assert_close(sums["clip_fraction"], (batch.weight * outside).sum())
    torch.testing.assert_close(sums["logprob_gap"], (batch.weight * (batch.old - batch.behaviour).abs()).sum())
    torch.testing.assert_close(sums["entropy"], batch.entropy[counted].sum())
    torch.testing.assert_close(sums["importance"], weight[counted].sum())
    torch.testing.assert_close(sums["masked_fraction"], (batch.weight * ((weight > 1.5) | (weight < 1 / 1.5))).sum())
    gap = batch.behaviour - batch.old
    torch.testing.assert_close(sums["sampler_kl"], (batch.weight * (torch.exp(-gap) + gap - 1)).sum())
    torch.testing.assert_close(terms.maxima["ratio"], ratio[counted].max())
    torch.testing.assert_close(terms.maxima["importance"], weight[counted].max())
    assert 0 < sums["masked_fraction"] < sums["tokens"]
    assert not any(value.requires_grad for value in (*sums.values(), *terms.maxima.values()))


def test_without_a_proximal_policy_there_are_no_weights_to_tell_of():
    terms = policy_loss(dataclasses.replace(tokens(), old=None), LossConfig(kl_coef=0.0, importance_cap=None), 1)
    assert "importance" not in terms.sums
    assert terms.maxima.keys() == {"ratio"}


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_divergence_on_average(estimator):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    torch.testing.assert_close((p * divergence(p.log(), q.log(), estimator)).sum(), (p * (p / q).log()).sum())


def test_k2_has_the_gradient_of_the_kl_divergence_on_average():
    logits, q = torch.tensor([0.3, -0.2, 0.5], requires_grad=True), torch.tensor([0.4, 0.4, 0.2])
    p = logits.log_softmax(0)
    (p.exp() * (p - q.log())).sum().backward()
    expected, logits.grad = logits.grad, None
    p = logits.log_softmax(0)
    (p.exp().detach() * divergence(p, q.log(), "k2")).sum().backward()
    torch.testing.assert_close(logits.grad, expected)


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


def test_what_is_configured_must_be_there():
    batch = tokens()
    with pytest.raises(ValueError, match="reference"):
        policy_loss(dataclasses.replace(batch, reference=None), LossConfig(kl_coef=0.1), 1)
    with pytest.raises(ValueError, match="whole responses"):
        policy_loss(dataclasses.replace(batch, sequence=None), LossConfig(kl_coef=0.0, ratio="sequence"), 1)


def test_a_mask_needs_weights():
    with pytest.raises(ValueError, match=r"mask_beyond: requires loss\.importance_cap"):
        LossConfig(mask_beyond=2.0, importance_cap=None)


def test_micro_batches_number_their_responses():
    rows = [Row(np.arange(n, n + 9, dtype=np.int32), np.zeros(1 + n % 3, np.float32), float(n)) for n in range(7)]
    for batch in plan(rows, 1, 20)[0]:
        assert sorted(set(batch.sequence)) == list(range(batch.sequence[-1] + 1))
        assert (np.diff(batch.sequence) >= 0).all()
        for number in set(batch.sequence):
            own = batch.advantage[batch.sequence == number]
            assert len(set(own)) == 1
            assert len(own) == 1 + int(own[0]) % 3
