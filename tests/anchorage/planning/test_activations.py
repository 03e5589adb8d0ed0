"""What the formulas say agrees with what autograd keeps of the learner's real code, on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anchorage.planning.activations import Pass
from anchorage.planning.shapes import PUBLISHED, shape_from
from tests.anchorage.planning.measuring import kept_bytes, line, policy_of, predicted
from tests.anchorage.planning.test_shapes import MODELS, OTHERS
from tests.models import SMALL

LARGEST_ERROR = 0.05
SHARED = 60
"""Tokens that all rows of a line begin with."""


def error(name: str, dtype: str, *, shared: int = 0, max_logits: int = 2**26, **options: int) -> float:
    """Relative error of the predicted bytes."""
    config = (MODELS | OTHERS)[name]()
    settings = {"checkpointing": False, "adapters": 0, **options}
    policy = policy_of(config, dtype, max_logits=max_logits, **settings)
    batch = line(4, 120, 20, SMALL.vocabulary, shared)
    whole = predicted(shape_from(config.to_dict()), batch, dtype, logits=max_logits, **settings)
    return whole.kept / kept_bytes(policy, batch) - 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_backward_pass_keeps_what_is_predicted(name: str, dtype: str, checkpointing: bool) -> None:
    assert abs(error(name, dtype, checkpointing=checkpointing)) < LARGEST_ERROR


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_keep_what_is_predicted(name: str) -> None:
    assert abs(error(name, "bfloat16")) < LARGEST_ERROR


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_beginnings_cost_masks_and_gathered_keys(name: str, dtype: str) -> None:
    assert abs(error(name, dtype, shared=SHARED)) < LARGEST_ERROR


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "phi3", "gpt2"])
def test_a_frozen_model_with_adapters_keeps_less(name: str, checkpointing: bool) -> None:
    assert abs(error(name, "bfloat16", adapters=4, checkpointing=checkpointing)) < LARGEST_ERROR


def test_logits_of_pieces_are_not_kept() -> None:
    assert abs(error("qwen2", "float32", max_logits=SMALL.vocabulary * 8)) < LARGEST_ERROR
    few, many = (Pass(PUBLISHED["Qwen3-4B"], 2, 4096, 4096, 1024, logits=logits) for logits in (2**20, 2**30))
    assert many.kept - few.kept == pytest.approx(4 * 151_936 * 1024)
    assert few.logits_at_once <= 3 * 4 * 2**20


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("Qwen2.5-1.5B-Instruct", 106.6), ("Qwen2.5-7B-Instruct", 232.6), ("Qwen3-4B", 178.5)]
)
def test_figures_measured_with_layers_of_full_size(name: str, kilobytes: float) -> None:
    """Measured on a CPU in bfloat16 with one layer of each model, a token and layer."""
    whole = Pass(PUBLISHED[name], 2, 1000, 1000, 100, attention="each")
    assert whole.a_token_and_layer / 1e3 == pytest.approx(kilobytes, rel=0.01)
    assert replace(whole, checkpointing=True).kept < whole.kept / 15


def test_one_kernel_for_all_sequences_needs_no_copy_of_its_result() -> None:
    shape = PUBLISHED["Qwen2.5-1.5B-Instruct"]
    each, flash = (Pass(shape, 2, 100, 100, 10, attention=kind) for kind in ("each", "flash"))  # type: ignore[arg-type]
    assert each.kept - flash.kept == 28 * 100 * 2 * 1536


@pytest.mark.parametrize(("positions", "pieces"), [(80, 1), (27, 3)])
def test_logits_at_once_are_what_is_alive(positions: int, pieces: int) -> None:
    """Tensors of a piece's size that are alive together, forward and backward, counted as PyTorch creates them."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    policy = policy_of(MODELS["qwen2"](), "float32", checkpointing=False, adapters=0, max_logits=96 * positions)
    batch = line(4, 120, 20, SMALL.vocabulary)
    whole = predicted(shape_from(MODELS["qwen2"]().to_dict()), batch, "float32", logits=96 * positions)
    live: WeakIdKeyDictionary = WeakIdKeyDictionary()
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                # The head's weight and its gradient have fewer numbers.
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (SMALL.vocabulary,) and len(tensor) != 32:
                    live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            most = max(most, sum(live.values()))
            return out

    from learner.rank.policy import inputs

    with Watch():
        logprob, _ = policy(*inputs(batch, torch.device("cpu")))
        logprob.sum().backward()
    assert whole.pieces == pieces
    assert 0.9 * whole.logits_at_once < most <= whole.logits_at_once
