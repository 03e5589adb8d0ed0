import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner import policy as policy_module
from learner.batching import Row, plan
from learner.engine_deepspeed import inputs
from learner.policy import load_policy
from services.errors import ModelUnavailable

ROWS = [Row(np.arange(n, n + 5 + n, dtype=np.int32), np.zeros(1 + n % 3, np.float32), 0.0) for n in (1, 4, 9, 13)]


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
def test_scores_are_those_of_each_row_alone(tiny_model, monkeypatch, max_logits):
    monkeypatch.setattr(policy_module, "MAX_LOGITS", max_logits)
    policy = load_policy(tiny_model, "float32", temperature=0.7)
    ((batch,),) = plan(ROWS, 1, 1000)
    logprob, entropy = policy(*inputs(batch, torch.device("cpu")))
    longest_first = sorted(ROWS, key=lambda row: -len(row.tokens))
    expected = [naive(tiny_model, row, 0.7) for row in longest_first]
    torch.testing.assert_close(logprob, torch.cat([e[0] for e in expected]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), rtol=1e-4, atol=1e-5)
    assert logprob.requires_grad
    assert not entropy.requires_grad


def test_pieces_have_the_gradient_of_the_whole(tiny_model, monkeypatch):
    ((batch,),) = plan(ROWS, 1, 1000)
    gradients = []
    for max_logits in (2**26, 64 * 3):
        monkeypatch.setattr(policy_module, "MAX_LOGITS", max_logits)
        policy = load_policy(tiny_model, "float32", temperature=0.7)
        logprob, entropy = policy(*inputs(batch, torch.device("cpu")), entropy_gradient=True)
        (logprob.sum() + entropy.sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-5)


def test_no_model(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        load_policy(tmp_path, "float32", 1.0)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelUnavailable, match="cannot load"):
        load_policy(tmp_path, "float32", 1.0)
