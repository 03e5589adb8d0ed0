"""Every architecture is trained on what its own forward pass computes, or refused with its reason."""

import copy

import numpy as np
import pytest
import torch

from learner.batching import MIN_SHARED, Row, plan
from learner.rank.forward import Forward, recompute_layers
from learner.rank.parity import require_exact
from learner.rank.policy import Policy, Route, inputs
from services.errors import ModelUnavailable
from tests.learner.rank.architectures import PACKED, POSITIONS, REFUSED, ROWS, VOCABULARY
from tests.models import random_model

TRAINED = PACKED | ROWS
TEMPERATURE = 0.8


def rows():
    """Shared beginnings, a row that begins another, a row past every window, and rows that share nothing."""
    random = np.random.default_rng(5)
    opening = random.integers(1, VOCABULARY, MIN_SHARED + 4)
    tokens = [np.concatenate([opening, random.integers(1, VOCABULARY, n)]) for n in (9, 17, 70)]
    tokens += [tokens[1][:-5], random.integers(1, VOCABULARY, 21), random.integers(1, VOCABULARY, 3)]
    values = random.normal(size=len(tokens))
    sizes = [min(len(one) - 1, 1 + 6 * n) for n, one in enumerate(tokens)]
    return [
        Row(one.astype(np.int32), np.zeros(size, np.float32), float(value))
        for one, size, value in zip(tokens, sizes, values, strict=True)
    ]


def plain(model, some):
    """Loss and gradients of the model's own forward pass in evaluation mode, one row at a time; and its scores."""
    model.eval()
    scores = []
    for row in some:
        ids = torch.tensor(row.tokens, dtype=torch.long)
        logits = model(input_ids=ids[None]).logits[0].float() / TEMPERATURE
        logs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0][-row.response_tokens :]
        (row.advantage * logs).sum().backward()
        scores.append(logs.detach())
    return scores, {name: parameter.grad for name, parameter in model.named_parameters()}


def learned(policy, some, budget):
    """The same by the learner's micro-batches."""
    scores = {}
    sharing = policy.route.sharing
    (batches,) = plan(some, 1, budget, sharing)
    for batch in batches:
        logprob, _ = policy(*inputs(batch, torch.device("cpu")))
        advantage = torch.tensor(batch.advantage)
        (advantage * logprob).sum().backward()
        for number, row in enumerate(some):
            own = logprob.detach()[advantage == torch.tensor(row.advantage, dtype=torch.float32)]
            if len(own):
                scores[number] = own
    return [scores[n] for n in range(len(some))], {n: p.grad for n, p in policy.lm.named_parameters()}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_on_its_own_function(name):
    model = random_model(TRAINED[name]())
    expected, gradients = plain(copy.deepcopy(model), rows())
    policy = Policy(model, TEMPERATURE, max_logits=8 * VOCABULARY, route=Route(packed=False)).train()
    parity = require_exact(policy, "auto", POSITIONS - 2)
    assert parity.path == ("packed" if name in PACKED else "rows"), parity.reasons
    assert parity.route.halves
    assert bool(parity.reasons) == (name in ROWS)
    recompute_layers(policy.lm)
    assert_same(learned(policy, rows(), 4000), (expected, gradients))


def test_a_model_that_cannot_be_divided_is_trained_whole(monkeypatch):
    def undivided(self):
        raise ValueError("its body cannot be separated from its head")

    monkeypatch.setattr(Forward, "_body", property(undivided))
    model = random_model(TRAINED["lfm2"]())
    expected = plain(copy.deepcopy(model), rows())
    policy = Policy(model, TEMPERATURE, route=Route(packed=False)).train()
    assert require_exact(policy, "auto", POSITIONS - 2).route == Route(packed=False, halves=False)
    assert_same(learned(policy, rows(), 4000), expected)


def assert_same(found, wanted):
    """Scores, and gradients to a thousandth."""
    (found, own), (expected, gradients) = found, wanted
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    # Some gradients are 0 but for rounding, such as that of a bias of keys.
    scale = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for key, gradient in gradients.items():
        if gradient is None:
            assert own[key] is None or not own[key].any(), key
        else:
            torch.testing.assert_close(
                own[key], gradient, rtol=1e-3, atol=1e-5 * scale, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name):
    make, reason = REFUSED[name]
    policy = Policy(random_model(make()), 1.0, route=Route(packed=False))
    with pytest.raises(ModelUnavailable, match=reason) as raised:
        require_exact(policy, "auto", POSITIONS - 2)
    assert "\n" not in str(raised.value)
