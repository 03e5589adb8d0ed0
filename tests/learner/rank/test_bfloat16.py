"""Training in bfloat16 under each ZeRO stage goes on after a restart as if there had been none: difference 0.0.

So it does, from stage 2 on, after the states were in host memory for another's turn on the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.rank.shards import ShardReader
from services.config.tree import Config
from services.model_folder import read_weights
from services.process import ReservedPort
from tests.processes import ROOT
from tests.tiers import long

STAGES = (1, 2, 3)
ADAPTERS = {"rank": 4, "alpha": 8.0}


def on_ranks(folder: Path, ranks: int, *arguments: str) -> list[dict[str, float]]:
    """Run every case on new rank processes; the figures of the updates on rank 0."""
    with ReservedPort("127.0.0.1") as port:
        place = [str(ranks), str(port.number), str(folder), *arguments]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    module = [sys.executable, "-m", "tests.learner.rank.stages"]
    processes = [
        subprocess.Popen([*module, str(rank), *place], **pipes, text=True, cwd=ROOT, env=environment)
        for rank in range(ranks)
    ]
    try:
        told = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, told[0][1][-2000:]
    return [json.loads(line) for line in told[0][0].splitlines() if line.startswith("{")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Master copies and moments of a checkpoint."""
    stored = ShardReader(folder)
    return {name: stored.get(name) for name in stored.names}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two checkpoints' numbers."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def movement(initial: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> torch.Tensor:
    """What training has added to the parameters, as one vector in float32."""
    masters = {name.removeprefix("master/"): tensor for name, tensor in end.items() if name.startswith("master/")}
    return torch.cat([(masters[name] - initial[name].float()).flatten() for name in sorted(masters)])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=long)])
def test_training_goes_on_after_a_restart_with_difference_zero(tiny_config: Config, tmp_path: Path, ranks: int) -> None:
    tree = tiny_config.model_dump(mode="json")
    tree["model"]["dtype"] = "bfloat16"
    trees = [{**tree, "learner": tree["learner"] | {"ranks": ranks, "zero_stage": stage}} for stage in STAGES]
    trees.append({**trees[1], "model": tree["model"] | {"lora": ADAPTERS}})
    (tmp_path / "cases.json").write_text(json.dumps(trees))
    for case in range(len(trees)):
        for part in ("middle", "end", "resumed"):
            (tmp_path / str(case) / part).mkdir(parents=True)

    straight = on_ranks(tmp_path, ranks)
    resumed = on_ranks(tmp_path, ranks, "resume")

    assert [figures["update"] for figures in straight] == [0, 1, 2] * len(trees)
    assert resumed == [figures for figures in straight if figures["update"] > 0]
    initial = read_weights(tiny_config.model.path)
    ends = [tensors(tmp_path / str(case) / "end") for case in range(len(trees))]
    for case, end in enumerate(ends):
        assert difference(tensors(tmp_path / str(case) / "resumed"), end) == 0.0
        assert difference(tensors(tmp_path / str(case) / "middle"), end) > 1e-4
    for end in ends[: len(STAGES)]:
        masters = [tensor for name, tensor in end.items() if name.startswith("master/")]
        assert all(tensor.dtype == torch.float32 for tensor in masters)
        assert any(not torch.equal(t, t.bfloat16().float()) for t in masters)  # more than bfloat16 holds
        assert movement(initial, end).abs().max() > 1e-3
    # Stage 1 sums gradients after the passes and stages 2 and 3 during them: the same but for rounding. AdamW makes a
    # full step even of a gradient that is all rounding, so single weights differ, by how much the processor decides.
    way, *others = [movement(initial, end) for end in ends[: len(STAGES)]]
    assert all(torch.cosine_similarity(way, other, dim=0) > 0.99 for other in others)
