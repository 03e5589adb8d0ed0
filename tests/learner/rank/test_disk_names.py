"""Weights under the names and in the layout of a checkpoint on disk, where transformers holds them otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from learner.rank import disk_names
from learner.rank.disk_names import DiskForm, weights_of
from services.errors import ModelUnavailable
from services.model_folder import read_others, read_weights, tensor_shapes, weight_files
from tests.actors.engine.many_models import CONFIGS, EXPERTS, SHAPE, make, write


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def rename(folder: Path, names: dict[str, str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({names.get(k, k): v for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_published_is_what_is_on_disk(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, make(name))
    stored = load_file(folder / "model.safetensors")
    lm = load(folder)
    disk = DiskForm(lm, folder)
    published = disk.published(weights_of(lm))
    assert published.keys() == stored.keys()
    for key, tensor in published.items():
        assert torch.equal(tensor, stored[key]), key
    forms = disk.form(torch.bfloat16)
    assert {name: form.shape for name, form in forms.items()} == {name: t.shape for name, t in published.items()}
    assert any(".experts.0." in key for key in published) == ("experts" in str(weights_of(lm).keys()))


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_by_layer_the_same_is_published(name: str, tmp_path: Path) -> None:
    lm = load(write(tmp_path, make(name)))
    disk = DiskForm(lm, tmp_path)
    whole, own = disk.published(weights_of(lm)), weights_of(lm)
    assert len(disk.parts) == 1 + lm.config.num_hidden_layers
    assert sorted(name for part in disk.parts for name in part) == sorted(own)
    found: dict[str, torch.Tensor] = {}
    for part in disk.parts:
        found |= disk.published({name: own[name] for name in part})
    assert found.keys() == whole.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, whole[key]), key


def test_what_cannot_be_converted_layer_by_layer_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(write(tmp_path, make("llama_untied")))

    def across(lm: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(tensors) < len(weights_of(lm)):
            raise ModelUnavailable("a layer is missing")
        return dict(tensors)

    monkeypatch.setattr(disk_names, "on_disk", across)
    assert DiskForm(lm, tmp_path).parts == (tuple(weights_of(lm)),)


def test_names_of_an_older_folder_are_kept(tmp_path: Path) -> None:
    """GPT-2 of the hub has no `transformer.` before its names."""
    folder = write(tmp_path, make("gpt2"))
    rename(folder, {key: key.removeprefix("transformer.") for key in load_file(folder / "model.safetensors")})
    lm = load(folder)
    published = DiskForm(lm, folder).published(weights_of(lm))
    assert published.keys() == load_file(folder / "model.safetensors").keys()
    assert "h.0.attn.c_attn.weight" in published


def test_a_tied_head_has_each_name_that_the_folder_gives_it(tmp_path: Path) -> None:
    folder = write(tmp_path, make("phi3"))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    lm = load(folder)
    with torch.no_grad():
        lm.get_input_embeddings().weight.add_(1)
    published = DiskForm(lm, folder).published(weights_of(lm))
    assert torch.equal(published["lm_head.weight"], embedding + 1)
    assert torch.equal(published["model.embed_tokens.weight"], embedding + 1)


def test_the_text_model_of_a_larger_one_has_its_prefix(tmp_path: Path) -> None:
    text = {**SHAPE, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    text |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    whole = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
    folder = write(tmp_path, whole)
    stored = load_file(folder / "model.safetensors")
    lm = load(folder)
    published = DiskForm(lm, folder).published(weights_of(lm))
    assert all(name.startswith("model.language_model.") for name in published)
    for key, tensor in published.items():
        assert torch.equal(tensor, stored[key]), key
    rest = dict(read_others(folder, published))
    assert rest.keys() == stored.keys() - published.keys()
    assert any("visual" in key for key in rest)


def test_weights_that_the_folder_has_not_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, make("llama_untied"))
    lm = load(folder)
    rename(folder, {"lm_head.weight": "head.weight"})
    with pytest.raises(ModelUnavailable, match=r"the weights files lack lm_head\.weight"):
        DiskForm(lm, folder)


def test_files_that_hold_the_weights_again_do_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path, make("llama_untied"))
    names = tensor_shapes(folder)
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    assert tensor_shapes(folder) == names
    assert read_weights(folder).keys() == names.keys()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(folder) == [folder / "model-00001-of-00001.safetensors"]
    assert tensor_shapes(folder) == names
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=r"cannot read .*index\.json"):
        read_weights(folder)
