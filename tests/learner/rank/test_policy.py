import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from learner import batching
from learner.batching import MIN_SHARED, Row, plan
from learner.rank.disk_names import DiskForm
from learner.rank.lora import adapt, switched_off
from learner.rank.policy import inputs, load_policy
from services.config.tree import LoraConfig
from services.errors import ModelUnavailable
from services.weights.adapter import merged

ROWS = [Row(np.arange(n, n + 5 + n, dtype=np.int32), np.zeros(1 + n % 3, np.float32), 0.0) for n in (1, 4, 9, 13)]


def in_line(batch, rows):
    """The rows in the order of the batch."""
    ends = batch.targets[np.diff(batch.sequence, append=-1) != 0]
    return [next(row for row in rows if row.tokens[-1] == end) for end in ends]


def naive(folder, row, temperature):
    """(log-probability, entropy) of the response, one row alone, all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    tokens = torch.as_tensor(row.tokens).long()
    with torch.no_grad():
        logs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
    first = len(tokens) - row.response_tokens
    logs, targets = logs[first - 1 : -1], tokens[first:]
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("max_logits", [2**26, 64 * 3])
def test_scores_are_those_of_each_row_alone(tiny_model, max_logits):
    policy = load_policy(tiny_model, "float32", 0.7, max_logits)
    ((batch,),) = plan(ROWS, 1, 1000)
    logprob, entropy = policy(*inputs(batch, torch.device("cpu")))
    expected = [naive(tiny_model, row, 0.7) for row in in_line(batch, ROWS)]
    torch.testing.assert_close(logprob, torch.cat([e[0] for e in expected]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), rtol=1e-4, atol=1e-5)
    assert logprob.requires_grad
    assert not entropy.requires_grad


def test_pieces_have_the_gradient_of_the_whole(tiny_model):
    ((batch,),) = plan(ROWS, 1, 1000)
    gradients = []
    for max_logits in (2**26, 64 * 3):
        policy = load_policy(tiny_model, "float32", 0.7, max_logits)
        logprob, entropy = policy(*inputs(batch, torch.device("cpu")), entropy_gradient=True)
        (logprob.sum() + entropy.sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-5)


def shared_beginnings():
    """Rows that share beginnings of several lengths, each with a last token of its own."""
    rng = np.random.default_rng(3)
    opening = rng.integers(0, 40, MIN_SHARED + 10)
    branch = rng.integers(0, 40, MIN_SHARED // 2)
    beginnings = [opening, np.append(opening, branch), opening, np.append(opening, branch), opening[:7], opening]
    return [
        Row(np.append(b, [*rng.integers(0, 40, 1 + n), 50 + n]).astype(np.int32), np.zeros(1 + n % 3, np.float32), 0.0)
        for n, b in enumerate(beginnings)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_beginnings_change_neither_scores_nor_gradients(tiny_model, monkeypatch, checkpointing):
    rows = shared_beginnings()
    results = []
    for min_shared in (MIN_SHARED, 10**6):
        monkeypatch.setattr(batching, "MIN_SHARED", min_shared)
        policy = load_policy(tiny_model, "float32", temperature=0.7).train()
        if checkpointing:
            policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ((batch,),) = plan(rows, 1, 4000)
        logprob, _ = policy(*inputs(batch, torch.device("cpu")))
        expected = torch.cat([naive(tiny_model, row, 0.7)[0] for row in in_line(batch, rows)])
        torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-5)
        (logprob * torch.linspace(-1, 1, len(logprob))).sum().backward()
        results.append((batch.tokens, [p.grad for p in policy.parameters()]))
    (few, shared), (many, alone) = results
    assert few < many
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_step_is_the_same_whatever_the_micro_batches(tiny_model):
    rng = np.random.default_rng(0)
    rows = [
        Row(rng.integers(0, 64, n).astype(np.int32), np.zeros(1 + n % 4, np.float32), float(rng.normal()))
        for n in rng.integers(5, 60, 40)
    ]
    total = sum(row.response_tokens for row in rows)
    outcomes = []
    for ranks, budget in ((1, 10_000), (1, 64), (1, 200), (3, 100)):
        policy = load_policy(tiny_model, "float32", temperature=1.0)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        for batch in (batch for own in plan(rows, ranks, budget) for batch in own):
            logprob, _ = policy(*inputs(batch, torch.device("cpu")))
            weight = torch.tensor(batch.weight * batch.advantage)
            (-(weight * logprob).sum() / total).backward()
        optimizer.step()
        outcomes.append([parameter.detach() for parameter in policy.parameters()])
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


class LiveStorages(TorchDispatchMode):
    """Most bytes alive at once of what the operations in the block made, saved for the backward pass or not."""

    def __init__(self, model):
        super().__init__()
        self._known = WeakIdKeyDictionary()
        self._live = self.peak = 0
        for parameter in model.parameters():
            self._known[parameter.untyped_storage()] = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        for storage in (tensor.untyped_storage() for tensor in made if torch.is_tensor(tensor)):
            if storage not in self._known:
                self._known[storage] = None
                self._live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _freed(self, size):
        self._live -= size


def test_logits_of_the_whole_batch_never_stand_in_memory(wide_model):
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 64, 33).astype(np.int32), np.zeros(32, np.float32), 1.0) for _ in range(8)]
    ((batch,),) = plan(rows, 1, 4000)
    logits = 4 * len(batch.targets) * 2**15
    peaks = []
    for limit in (2**18, 2**30):
        policy = load_policy(wide_model, "float32", 1.0, limit)
        with LiveStorages(policy) as storages:
            logprob, entropy = policy(*inputs(batch, torch.device("cpu")), entropy_gradient=True)
            (logprob.sum() + entropy.sum()).backward()
        peaks.append(storages.peak)
    in_pieces, whole = peaks
    assert in_pieces < logits / 2
    assert whole > 2 * logits


def test_adapters_are_the_model_plus_their_product(tiny_model):
    lora = LoraConfig(rank=2, alpha=3)
    base = load_policy(tiny_model, "float32", 1.0)
    adapted = load_policy(tiny_model, "float32", 1.0)
    adapters = adapt(adapted, lora, DiskForm(adapted.lm, tiny_model))
    trained = {name: parameter for name, parameter in adapted.lm.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.3)
    ((batch,),) = plan(ROWS, 1, 1000)
    given = inputs(batch, torch.device("cpu"))
    alone, with_adapters = base(*given)[0], adapted(*given)[0]
    assert float((alone - with_adapters).detach().abs().max()) > 0.1
    with switched_off(adapted):
        torch.testing.assert_close(adapted(*given)[0], alone)
    weights = merged(adapters.broadcast(trained), dict(base.lm.named_parameters()))
    with torch.no_grad():
        for name, parameter in base.lm.named_parameters():
            parameter.copy_(weights[name])
    torch.testing.assert_close(base(*given)[0], with_adapters, rtol=1e-4, atol=1e-5)


def test_no_model(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        load_policy(tmp_path, "float32", 1.0)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelUnavailable, match="cannot load"):
        load_policy(tmp_path, "float32", 1.0)
