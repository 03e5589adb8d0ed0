"""What the measurement sees, on which weights, and what it leaves behind."""

import copy

import numpy as np
import pytest
import torch
import transformers

from learner.batching import Row, plan
from learner.rank import attention, parity
from learner.rank.parity import check_small_folder, measure, measure_folder, require_exact
from learner.rank.policy import Policy, Route, inputs, load_policy
from learner.warmstart import load
from services.config.tree import Config
from services.errors import ModelUnavailable
from tests.learner.rank.architectures import (
    PACKED,
    POSITIONS,
    REFUSED,
    ROWS,
    VOCABULARY,
    write_architecture,
)
from tests.models import SMALL, random_model

CONTEXT = POSITIONS - 10
FRESH = ("lfm2", "mamba2", "falcon_h1", "qwen3_5", "qwen3_next", "jamba", "minimax", "recurrent_gemma")


def unmeasured(model):
    return Policy(model, 1.0, route=Route(packed=False))


def fresh(config):
    """With the customary deviation of 0.02: a leak between rows is a ten-thousandth of a nat."""
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_leaks_is_seen_in_new_weights_too(name, dtype):
    found = measure(unmeasured(fresh(ROWS[name]()).to(dtype)), "auto", CONTEXT)
    assert (found.path, found.refusal) == ("rows", None)


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_later_tokens_are_seen_in_new_weights_too(name):
    config, reason = REFUSED[name]
    refusal = measure(unmeasured(fresh(config())), "auto", CONTEXT).refusal
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "gemma3_window", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_are_packed_where_that_is_exact(name, dtype):
    found = measure(unmeasured(fresh(PACKED[name]()).to(dtype)), "auto", CONTEXT)
    assert (found.path, found.reasons) == ("packed", ())


@pytest.mark.parametrize("name", [*PACKED, *ROWS])
def test_bfloat16_takes_the_same_route_and_keeps_its_weights(name):
    model = random_model((PACKED | ROWS)[name]()).to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = measure(unmeasured(model), "auto", CONTEXT)
    assert found.path == ("packed" if name in PACKED else "rows"), found.reasons
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_without_memory_for_float32_bfloat16_decides(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(parity, "_in_float32", full)
    for name in ("llama", "mistral_window", "qwen3_5", "mamba", "lfm2", "bamba"):
        model = random_model((PACKED | ROWS)[name]()).to(torch.bfloat16)
        found = measure(unmeasured(model), "auto", CONTEXT)
        assert (found.path, found.dtype) == ("packed" if name in PACKED else "rows", "bfloat16"), name


def test_an_argument_of_attention_is_never_dropped():
    model = random_model(ROWS["gemma2"]())
    model.config.attn_logit_softcapping = 1e6  # shows in no number
    found = measure(unmeasured(model), "auto", CONTEXT)
    assert found.reasons == ("its attention has softcap",)
    refused = measure(unmeasured(model), "packed", CONTEXT)
    assert refused.refusal == "learner.packing=packed is not exact for Gemma2ForCausalLM: its attention has softcap"
    assert measure(unmeasured(random_model(PACKED["llama"]())), "rows", CONTEXT).path == "rows"
    assert measure(unmeasured(random_model(PACKED["llama"]())), "packed", CONTEXT).path == "packed"


@pytest.mark.parametrize("broken", ["scaling", "sliding_window", "path"])
def test_what_is_dropped_in_our_own_attention_is_seen(monkeypatch, broken):
    def without(module, query, key, value, mask, *, layout=None, **others):
        if broken == "path":  # reads its own tokens only
            layout = attention.Layout.of(
                np.array(layout.bounds), np.array(layout.bounds), np.arange(layout.bounds[-1]), query.device
            )
        else:
            others[broken] = None if broken == "sliding_window" else 0.5
        return attention.packed_attention(module, query, key, value, mask, layout=layout, **others)

    monkeypatch.setattr("learner.rank.policy.register", lambda: "broken")
    transformers.AttentionInterface.register("broken", without)
    found = measure(unmeasured(random_model(PACKED["mistral_window"]())), "auto", CONTEXT)
    assert found.path == "rows"
    assert "packed rows are off by" in found.reasons[0]


def test_a_function_of_the_length_of_a_row_is_scored_row_by_row():
    """Phi-3's scaling of positions changes at a length: the beginning of a longer row is scored otherwise."""
    scaling = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = transformers.Phi3Config(
        **SMALL.shape,
        rope_parameters=scaling | {"original_max_position_embeddings": 70},
        original_max_position_embeddings=70,
    )
    assert measure(unmeasured(random_model(copy.deepcopy(config))), "auto", 60).path == "packed"
    policy = unmeasured(random_model(config))
    found = measure(policy, "auto", CONTEXT)
    assert found.route == Route(packed=False, prefixes=False)
    assert found.route.sharing == "nothing"
    random = np.random.default_rng(2)
    tokens = random.integers(1, VOCABULARY, 90).astype(np.int32)
    rows = [Row(some, np.zeros(5, np.float32), float(n)) for n, some in enumerate((tokens[:60], tokens))]
    (batches,) = plan(rows, 1, 1000, found.route.sharing)
    assert [batch.tokens for batch in batches] == [90, 60]
    for batch, row in zip(batches, rows[::-1], strict=True):
        ids = torch.tensor(row.tokens, dtype=torch.long)
        logs = policy.lm(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[-5:, 0]
        torch.testing.assert_close(policy(*inputs(batch, torch.device("cpu")))[0], logs)


def test_a_function_of_what_was_scored_before_is_refused():
    """Dynamic scaling of positions keeps that of the longest row so far."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = transformers.LlamaConfig(**SMALL.shape | {"max_position_embeddings": 40}, rope_parameters=scaling)
    with pytest.raises(ModelUnavailable, match="what it scored before changes what it scores now"):
        require_exact(unmeasured(random_model(config)), "auto", CONTEXT)


def test_numbers_that_are_none_are_refused():
    model = random_model(PACKED["llama"]())
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelUnavailable, match="log-probabilities are not finite"):
        require_exact(unmeasured(model), "auto", CONTEXT)


def test_a_row_beyond_the_positions_is_refused():
    for name in ("gpt2", "opt", "gpt_neo"):
        policy = unmeasured(random_model((PACKED | ROWS)[name]()))
        with pytest.raises(ModelUnavailable, match=r"fails on a row of 200 tokens: \w+"):
            require_exact(policy, "auto", 200)


def test_folders(tmp_path):
    config = Config.model_validate({"model": {"max_prompt_tokens": 100, "max_response_tokens": 24}})
    folder = write_architecture(tmp_path / "stablelm", ROWS["stablelm"]())
    check_small_folder(folder, config)
    found = measure_folder(folder, "float32", 124)
    assert found.path == "rows"
    assert found.line().startswith("StableLmForCausalLM: each row alone (")
    assert type(load(folder, config)).__name__ == "StableLmForCausalLM"
    bert = write_architecture(tmp_path / "bert", REFUSED["bert"][0]())
    for refused in (lambda: check_small_folder(bert, config), lambda: load(bert, config)):
        with pytest.raises(ModelUnavailable, match="not causal"):
            refused()
    bart = transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1)
    transformers.BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    (tmp_path / "bart" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="encoder-decoder"):
        load_policy(tmp_path / "bart", "float32", 1.0)


def test_weights_that_a_folder_lacks_are_not_drawn_at_random(tmp_path):
    folder = write_architecture(tmp_path / "model", PACKED["llama_untied_with_biases"]())
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "mlp.up" not in key}, file, {"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lack .*mlp\.up_proj.* and 1 more, which would be random numbers"):
        load_policy(folder, "float32", 1.0)
