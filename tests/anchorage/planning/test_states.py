"""What the formulas say agrees with what DeepSpeed's engine holds on real ranks, one and two, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anchorage.planning.shapes import PUBLISHED, shape_of
from anchorage.planning.states import BUCKET, adapter_parameters, number_bytes, states_of
from services.config.tree import Config
from services.process import ReservedPort
from tests.learner.conftest import write_model
from tests.processes import ROOT

LARGEST_ERROR = 0.05
GIB = 2**30
AWAY = {"offload_optimizer": True}
CASES: list[tuple[int, str, dict[str, int] | None, dict[str, bool]]] = [
    (0, "float32", None, {}),
    (1, "float32", None, {}),
    (1, "bfloat16", None, {}),
    (2, "float32", None, {}),
    (2, "bfloat16", None, {}),
    (3, "float32", None, {}),
    (3, "bfloat16", None, {}),
    (2, "bfloat16", {"rank": 8}, {}),
    (3, "float32", {"rank": 8}, {}),
    (1, "bfloat16", None, AWAY),
    (1, "float32", None, AWAY),
    (2, "float32", None, AWAY),
    (2, "bfloat16", None, AWAY),
    (3, "bfloat16", None, AWAY),
    (3, "float32", None, AWAY | {"offload_parameters": True}),
]
"""ZeRO stage, data type, adapters, off-loading."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some thousand parameters, so that padding for the ranks does not count."""
    return write_model(tmp_path_factory.mktemp("planned"), 256)


def config_of(
    model: Path, ranks: int, stage: int, dtype: str, lora: dict[str, int] | None, away: dict[str, bool]
) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": dtype, "lora": lora, "max_prompt_tokens": 32, "max_response_tokens": 8},
            "learner": {"zero_stage": stage, "ranks": ranks, "microbatch_tokens": 64, **away},
        }
    )


def measured(configs: list[Config], ranks: int, folder: Path) -> list[dict[str, int]]:
    """Bytes by kind on the first rank, for each configuration."""
    file = folder / "cases.json"
    file.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    with ReservedPort("127.0.0.1") as port:
        place = [str(ranks), str(port.number), str(file)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    module = [sys.executable, "-m", "tests.anchorage.planning.ranks"]
    processes = [
        subprocess.Popen([*module, str(rank), *place], **pipes, text=True, cwd=ROOT, env=environment)
        for rank in range(ranks)
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(line) for line in told[0].splitlines() if line.startswith("{")]


def expected(config: Config) -> dict[str, int]:
    """Bytes by kind; on a CPU host and device are one, so off-loaded states are compared all together."""
    shape = shape_of(config.model.path)
    states = states_of(shape, config)
    whole = {"everything": states.parameters + states.gradients + states.optimizer + states.host}
    if config.learner.zero_stage == 3 and config.learner.ranks > 1:
        # All parameters of so small a model are below DeepSpeed's threshold, and stay gathered after their first use.
        whole["everything"] += states.loading + number_bytes(config) * adapter_parameters(shape, config)
    if not config.learner.offload_optimizer:
        return whole | {kind: getattr(states, kind) for kind in ("parameters", "gradients", "optimizer")}
    if config.learner.zero_stage < 3:
        # The largest gradient on the device, part of `transient` where there is one.
        whole["everything"] += number_bytes(config) * shape.embedding
    return whole


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_holds_what_is_predicted(model: Path, tmp_path: Path, ranks: int) -> None:
    configs = [config_of(model, ranks, *case) for case in CASES]
    found = measured(configs, ranks, tmp_path)
    assert len(found) == len(CASES)
    wrong = [
        (case, kind, sizes[kind], size)
        for case, config, sizes in zip(CASES, configs, found, strict=True)
        for kind, size in expected(config).items()
        if abs(size - sizes[kind]) > LARGEST_ERROR * sizes[kind]
    ]
    assert not wrong


def of(**sections: dict[str, Any]) -> Any:
    """States of Qwen2.5-1.5B in bfloat16."""
    tree = {"model": {"dtype": "bfloat16"} | sections.pop("model", {}), **sections}
    return states_of(PUBLISHED["Qwen2.5-1.5B-Instruct"], Config.model_validate(tree))


def test_bytes_a_parameter_of_one_rank() -> None:
    size = 1_543_714_304
    second = of(learner={"zero_stage": 2})
    assert second.parameters + second.gradients + second.optimizer == 18 * size
    assert second.reference == 2 * size
    first = of(learner={"zero_stage": 1})
    assert first.parameters + first.gradients + first.optimizer == 20 * size


@pytest.mark.parametrize("stage", [2, 3])
def test_off_loading_moves_states_to_the_host(stage: int) -> None:
    here, away = of(learner={"zero_stage": stage}), of(learner={"zero_stage": stage, "offload_optimizer": True})
    assert away.optimizer == 0
    assert away.host - here.host >= here.optimizer


def test_the_reference_is_where_it_is_configured_to_be() -> None:
    places = {
        kind: of(learner={"zero_stage": 2, "reference": kind, "ranks": 2})
        for kind in ("resident", "offloaded", "sharded")
    }
    whole = places["resident"].reference
    assert places["sharded"].reference == whole / 2
    assert (places["offloaded"].reference, places["offloaded"].host) == (0, whole)
    assert places["offloaded"].reference_alone == whole
    assert of(learner={"zero_stage": 2}, loss={"kl_coef": 0.0}).reference == 0
    assert of(learner={"zero_stage": 2}, model={"lora": {"rank": 8}}).reference == 0


def test_adapters_are_counted_as_peft_makes_them() -> None:
    lora = Config.model_validate({"model": {"lora": {"rank": 8}}})
    shape = PUBLISHED["Qwen2.5-7B-Instruct"]
    # Published for rank 8 on all linear layers: 20.2 million.
    assert adapter_parameters(shape, lora) == pytest.approx(20.2e6, rel=0.01)


def test_the_bucket_is_that_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig()
    assert zero.reduce_bucket_size == BUCKET
    assert zero.max_live_parameters == zero.sub_group_size == 2 * BUCKET
