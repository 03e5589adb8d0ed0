"""vLLM against the learner, before and after updates of whole models and of adapters, for several architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorage.checks.engine_parity import ADAPTED, STAGES, measure_engine
from learner.checkpoint import export_policy
from learner.rank.disk_names import DiskForm, weights_of
from learner.rank.policy import Route, load_policy
from services.config.tree import LoraConfig
from tests.actors.engine.many_models import make, write


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "qwen2_moe", "phi3", "gpt2", "llama_untied"])
def test_log_probabilities_are_the_learners(name: str, tmp_path: Path) -> None:
    """Also of the folder that an export writes, which vLLM loads here."""
    made = write(tmp_path / "made", make(name))
    policy = load_policy(made, "float32", 1.0, route=Route(packed=False))
    folder = tmp_path / "exported"
    export_policy(folder, DiskForm(policy.lm, made).published(weights_of(policy.lm)), made)
    gaps = measure_engine(folder, "float32", 128, LoraConfig(rank=4, alpha=8))
    assert [gap.stage for gap in gaps] == [*STAGES, ADAPTED]
    for gap in gaps:
        assert gap.within(1e-4, 1e-5), gap


def test_heads_that_vllm_cannot_do_are_told_before_anything_is_sampled(tmp_path: Path) -> None:
    shape = {"head_dim": 16, "num_attention_heads": 4}
    model = make("llama_untied")
    config = model.config.__class__(**(model.config.to_dict() | shape))
    (gap,) = measure_engine(write(tmp_path, type(model)(config)), "float32", 64)
    assert "attention heads of size 16" in gap.failure
