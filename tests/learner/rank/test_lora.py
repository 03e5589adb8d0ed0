"""Adapters of many architectures: which layers get one, and that the merged model is the one that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from learner.rank.disk_names import DiskForm
from learner.rank.lora import Adapters, adapt, adaptable_layers, check_targets
from learner.rank.policy import Policy, Route, load_policy
from services.config.tree import LoraConfig
from services.errors import ModelUnavailable
from services.model_folder import read_weights
from services.weights import WeightsCorrupt
from services.weights.adapter import DELTA, A, B, is_adapter, merged
from tests.actors.engine.many_models import SHAPE, make, write

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
KINDS = {
    "llama_untied": ATTENTION | DENSE,
    "gemma2": ATTENTION | DENSE,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "qwen3_moe": ATTENTION,
    "qwen2_moe": ATTENTION | DENSE | {"shared_expert_gate"},
    "mixtral": ATTENTION,
    "glm4_moe": ATTENTION | DENSE,
    "deepseek_v3": LATENT | DENSE,
}


def load(folder: Path) -> Policy:
    return load_policy(folder, "float32", 1.0, route=Route(packed=False))


def adapted(folder: Path, lora: LoraConfig) -> tuple[Policy, Adapters, dict[str, Tensor]]:
    """A policy with adapters that are not 0, and their parameters."""
    policy = load(folder)
    adapters = adapt(policy, lora, DiskForm(policy.lm, folder))
    trained = {name: parameter for name, parameter in policy.lm.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.1, generator=generator)
    return policy, adapters, trained


@pytest.mark.parametrize("name", KINDS)
def test_the_merged_model_is_the_one_that_trains(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "base", make(name))
    policy, adapters, trained = adapted(folder, LoraConfig(rank=4, alpha=8))
    assert {layer.rpartition(".")[2] for layer in adapters.layers} == KINDS[name]
    assert not any("experts" in layer.split(".") for layer in adapters.layers)
    assert {key.partition(".lora_")[0] for key in trained} == set(adapters.layers)

    broadcast = adapters.broadcast(trained)
    assert is_adapter(broadcast)
    whole = write(tmp_path / "merged", make(name))
    save_file(merged(broadcast, read_weights(folder)), whole / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(5))
    policy.lm.set_attn_implementation("sdpa")
    own = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        ours, theirs, without = (lm.eval()(ids).logits for lm in (policy.lm, own(whole), own(folder)))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert float((ours - without).abs().max()) > 0.1


def test_layers_that_the_forward_pass_goes_past_get_none(tmp_path: Path) -> None:
    """Mamba reads the weight of `dt_proj` itself: an adapter of it would never act."""
    config = transformers.MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=1, state_size=8)
    folder = write(tmp_path, transformers.MambaForCausalLM(config))
    kinds = {name.rpartition(".")[2] for name in adaptable_layers(load(folder))}
    assert kinds == {"in_proj", "x_proj"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("nothing",), "no layer is called nothing; Phi3ForCausalLM has down_proj, gate_up_proj, o_proj, qkv_proj"),
        (("o_proj", "q_proj"), "no layer is called q_proj"),
        (("lm_head",), "lm_head cannot have an adapter"),
        (("embed_tokens",), "model.embed_tokens cannot have an adapter"),
        (("input_layernorm",), "input_layernorm cannot have an adapter"),
    ],
)
def test_targets_that_match_nothing_that_fits(targets: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, make("phi3"))
    policy = load(folder)
    told = r"model\.lora\.targets: .*" + message.replace(".", r"\.")
    with pytest.raises(ModelUnavailable, match=told):
        adapt(policy, LoraConfig(targets=targets), DiskForm(policy.lm, folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=told):
        check_targets(folder, targets)


@pytest.mark.parametrize("name", KINDS)
def test_targets_are_checked_without_the_weights(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, make(name))
    (folder / "model.safetensors").unlink()
    check_targets(folder, ["all-linear", *KINDS[name]])


def test_chosen_targets(tmp_path: Path) -> None:
    folder = write(tmp_path, make("phi3"))
    _, adapters, _ = adapted(folder, LoraConfig(targets=("o_proj", "layers.1.mlp.down_proj")))
    assert set(adapters.layers) == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    }


def test_an_adapter_is_compared_with_the_layer_that_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.rank.lora._factors", lambda layer, down, up: (up, down))  # the scale is forgotten
    folder = write(tmp_path, make("phi3"))
    policy = load(folder)
    with pytest.raises(ModelUnavailable, match="with its adapter merged is another layer"):
        adapt(policy, LoraConfig(rank=4, alpha=8), DiskForm(policy.lm, folder))


def test_adapters_in_either_form() -> None:
    base = {"a": torch.eye(2), "b": torch.ones(2, 3), "count": torch.tensor([3])}
    whole = merged({"a" + DELTA: torch.ones(2, 2), "b" + B: torch.ones(2, 1), "b" + A: torch.full((1, 3), 2.0)}, base)
    assert torch.equal(whole["a"], torch.eye(2) + 1)
    assert torch.equal(whole["b"], torch.full((2, 3), 3.0))
    assert torch.equal(whole["count"], torch.tensor([3]))
    with pytest.raises(WeightsCorrupt, match="no other"):
        merged({"other" + DELTA: torch.ones(2, 2)}, base)
    with pytest.raises(WeightsCorrupt, match=r"the adapter of b is \(3, 2\), of the weight \(2, 3\)"):
        merged({"b" + DELTA: torch.ones(3, 2)}, base)


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.PhimoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
        lambda: transformers.Llama4TextConfig(
            **SHAPE, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64
        ),
    ],
)
def test_a_router_that_returns_its_choice_gets_none(config: Callable[[], Any], tmp_path: Path) -> None:
    """By its class it is a linear layer: peft would take what it returns for a tensor."""
    folder = write(tmp_path, transformers.AutoModelForCausalLM.from_config(config()))
    _, adapters, _ = adapted(folder, LoraConfig(rank=2))
    kinds = {name.rpartition(".")[2] for name in adapters.layers}
    assert kinds >= ATTENTION
    assert "router" not in kinds
