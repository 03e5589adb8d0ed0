"""Everything that can be known to be wrong is reported at once, before anything starts."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorage.checks import model_shape
from anchorage.checks import preflight as checks
from anchorage.checks.preflight import Start, preflight
from services.config import Config
from services.errors import PreflightFailed
from tests import needs
from tests.env_servers.launching import launch

STARTER = Path("models/starter")


def problems(config: Config, **start: object) -> list[str]:
    """What the preflight of a training run says."""
    options = {"models": (config.model.path,), "trains": True, "plays_panels": True} | start
    with pytest.raises(PreflightFailed) as caught:
        preflight(Start(config, **options))  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def made(tmp_path: Path, **sections: dict[str, object]) -> Config:
    return Config.model_validate({"run": {"dir": tmp_path}, **sections})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the starter policy."""
    return shutil.copytree(STARTER, tmp_path / "model")


FITTING = """
import sys
from pathlib import Path
from anchorage.checks.preflight import Start, preflight
from services.config import Config

config = Config.model_validate({"run": {"dir": sys.argv[1]}})
preflight(Start(config, models=(Path(sys.argv[2]),), trains=True, plays_panels=True))
print(sorted({"ray", "vllm", "deepspeed"} & sys.modules.keys()))
"""


def test_a_run_that_can_start_passes_without_loading_what_takes_long(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FITTING, str(tmp_path / "runs"), str(STARTER)]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True).stdout == "[]\n"
    assert not (tmp_path / "runs").exists()


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = made(
        tmp_path,
        run={"dir": tmp_path / "file"},
        model={"path": "/no/such/model"},
        env={"split": "trian"},
        evaluation={"split": "valid_unsen"},
    )
    found = problems(config)
    assert len(found) == 4
    for part in ("is a file (run.dir", "/no/such/model", "did you mean train?", "'valid_unsen'"):
        assert any(part in line for line in found), part


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"name": "alfwrld"}, r"unknown environment 'alfwrld' .*did you mean alfworld\?"),
        ({"name": "webshop", "engine": "textworld"}, "env.engine=textworld: webshop has no such engine"),
        ({"url": "http://127.0.0.1:9"}, "no environment server at http://127.0.0.1:9"),
    ],
)
def test_environments_that_cannot_be_played(tmp_path: Path, env: dict[str, object], message: str) -> None:
    [line] = problems(made(tmp_path, env=env))
    assert re.search(message, line), line


def test_panels_that_a_split_cannot_fill_are_refused(tmp_path: Path) -> None:
    [line] = problems(made(tmp_path, evaluation={"episodes": 200, "panels": 2}))
    assert "2 panels of 200 take 400 different tasks" in line
    preflight(Start(made(tmp_path, evaluation={"episodes": 100_000}), plays_panels=True))  # the whole split


def test_each_split_that_is_not_there_is_told_with_its_key(tmp_path: Path) -> None:
    found = problems(made(tmp_path, evaluation={"split": ["valid_sen", "valid_seen", "valid_unsen"]}))
    assert len(found) == 2
    for line, meant in zip(found, ("valid_seen", "valid_unseen"), strict=True):
        assert re.match(rf"evaluation\.split: .* did you mean {meant}\?", line)


def test_more_episodes_than_any_split_has_take_no_time(tmp_path: Path) -> None:
    mix = [{"name": "alfworld"}, {"name": "webshop"}]
    for envs in [], mix:
        config = made(tmp_path, envs=envs, evaluation={"episodes": 2**31 - 1})  # type: ignore[arg-type]
        preflight(Start(config, plays_panels=True))


def test_what_is_written_elsewhere_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "file").touch()
    weights: dict[str, object] = {"channel": "directory", "directory": tmp_path / "file" / "weights"}
    found = problems(made(tmp_path, weights=weights, telemetry={"wandb": "online"}))
    assert len(found) == 2
    assert "WANDB_API_KEY" in found[0]
    assert "is a file (weights.directory)" in found[1]


def test_a_remote_environment_is_asked_for_its_splits(tmp_path: Path) -> None:
    with launch(tmp_path / "server") as server:
        config = made(tmp_path, env={"name": "counting", "url": server.url, "split": "tran"})
        [line] = problems(config, plays_panels=False)
        assert "counting has no tasks in split 'tran'" in line


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


def written(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(num_attention_heads=16), "attention heads of size 8"),
        # As GPT-2, and as MPT.
        (edited(num_attention_heads=None, hidden_size=None, n_head=16, n_embd=128), "attention heads of size 8"),
        (edited(num_attention_heads=None, hidden_size=None, n_heads=16, d_model=128), "attention heads of size 8"),
        (edited(max_position_embeddings=128), "exceeds the model's context of 128 tokens"),
        (edited(architectures=[]), "architectures is missing in"),
        (edited(model_type=None), "model_type is missing"),
        (written("config.json", "{"), "cannot read"),
        (written("config.json", "[]"), "not the configuration"),
        (written("tokenizer.json", "{"), "cannot load the tokenizer"),
        (cut_short, "cannot read the weights"),
        (written("model.safetensors", "garbage, and no safetensors header"), "cannot read the weights"),
        (
            written("model.safetensors.index.json", json.dumps({"weight_map": {"a": "model-2.safetensors"}})),
            "missing weights",
        ),
        (written("model.safetensors.index.json", "[]"), "model.safetensors.index.json"),
    ],
)
def test_models_that_cannot_be_used(tmp_path: Path, model: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(model)
    [line] = problems(made(tmp_path, model={"path": model}))
    assert message in line
    assert str(model) in line


def test_settings_that_the_model_or_the_machine_cannot_do(tmp_path: Path) -> None:
    rollout: dict[str, object] = {"tensor_parallel": 3, "kv_cache_mib": 2**28}
    found = problems(made(tmp_path, rollout=rollout, weights={"channel": "nccl"}, checkpoint={"keep": 10**8}))
    for part in (
        "tensor_parallel=3 does not divide the 4 heads",
        "kv_cache_mib",
        "needs GPUs",
        "not enough disk space",
    ):
        assert any(part in line for line in found), part


@pytest.mark.parametrize(
    ("shape", "needed_mib"),
    [
        ({}, 200),
        ({"num_key_value_heads": 1}, 50),
        ({"head_dim": 64}, 400),
        ({"sliding_window": 512, "use_sliding_window": False}, 200),
        ({"layer_types": 100 * ["full_attention", "sliding_attention"]}, 50),
        ({"sliding_window": 512, "use_sliding_window": True}, 0),
        ({"mamba_d_state": 16}, 0),
        ({"kv_lora_rank": 16}, 0),
        ({"num_key_value_heads": None}, 0),
    ],
)
def test_the_cache_must_hold_one_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, shape: dict[str, object], needed_mib: int
) -> None:
    """400 layers, with keys and values of 4 heads of 32 float32 numbers, of 512 tokens; 0: nothing is known."""
    monkeypatch.setattr(model_shape, "engine_is_on_cpu", lambda: True)
    edited(**{"num_hidden_layers": 400, "layer_types": None} | shape)(model)
    lengths = {"max_prompt_tokens": 500, "max_response_tokens": 12}
    for mib in {16, max(16, needed_mib - 1), max(16, needed_mib)}:
        config = made(tmp_path, model=lengths, rollout={"kv_cache_mib": mib})
        found = [line for line in model_shape.shape_problems(model, config) if "kv_cache_mib" in line]
        assert len(found) == (mib < needed_mib)
        assert not found or f"needs {needed_mib} MiB" in found[0]


def test_a_redis_that_is_away_is_told_where_nothing_else_is_wrong(tmp_path: Path) -> None:
    buffer: dict[str, object] = {"redis_url": "redis://:hidden@127.0.0.1:9", "reconnect_s": 0.2}
    [line] = problems(made(tmp_path, buffer=buffer))
    assert "127.0.0.1:9" in line
    assert "hidden" not in line
    [line] = problems(made(tmp_path, buffer=buffer, model={"path": "/no/such/model"}))
    assert "/no/such/model" in line


def test_a_cluster_of_ray_that_is_away_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setattr(checks, "RAY_PATIENCE_S", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    [line] = problems(made(tmp_path))
    assert f"no Ray cluster at RAY_ADDRESS=127.0.0.1:{closed_port}" in line
    for wrong in "nowhere", "127.0.0.1:", ":6379", "host:70000", "http://host/x":
        monkeypatch.setenv("RAY_ADDRESS", wrong)
        [line] = problems(made(tmp_path))
        assert f"RAY_ADDRESS={wrong} is not the address of a Ray cluster" in line


def test_a_cluster_of_ray_that_is_still_starting_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(checks.time, "sleep", lambda seconds: server.listen())
        preflight(Start(made(tmp_path), models=(STARTER,), trains=True, plays_panels=True))


def test_more_ranks_than_cores_are_refused_in_a_cluster_of_the_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 2)
    (line,) = problems(made(tmp_path, learner={"ranks": 1000}), models=(STARTER,))
    assert line.startswith("learner.ranks=1000, and this machine has 2 processor core(s)")
    preflight(Start(made(tmp_path, learner={"ranks": 2}), models=(STARTER,), trains=True))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    preflight(Start(made(tmp_path, learner={"ranks": 1000}), models=(STARTER,), trains=True))


def test_turns_on_the_gpus_of_a_cluster_are_refused_before_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    config = made(tmp_path, rollout={"share_gpus": "turns"}, learner={"zero_stage": 2})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    preflight(Start(config, models=(STARTER,), trains=True))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    (line,) = problems(config, models=(STARTER,))
    assert line.startswith("rollout.share_gpus=turns: learner and actor take turns on the GPUs of one machine")


def test_a_lora_target_that_matches_nothing_is_told_before_the_start(tmp_path: Path) -> None:
    model = {"path": STARTER, "lora": {"targets": ["q_proj", "query"]}}
    (line,) = problems(made(tmp_path, model=model))
    assert line.startswith("model.lora.targets: no layer is called query; Qwen2ForCausalLM has down_proj, gate_proj")


def test_vllm_takes_the_temperatures_that_a_configuration_may_have_and_no_others() -> None:
    sampling = pytest.importorskip("vllm.sampling_params", reason=needs.VLLM)
    for taken in 0.01, 2.0:
        config = Config.model_validate({"rollout": {"temperature": taken}, "evaluation": {"temperature": taken}})
        assert sampling.SamplingParams(temperature=config.rollout.temperature).temperature == taken
    assert sampling.SamplingParams(temperature=0.009).temperature == 0.01
    refusal = pytest.importorskip("vllm.exceptions").VLLMValidationError
    with pytest.raises(refusal, match="temperature"):
        sampling.SamplingParams(temperature=2.01)


def test_the_head_sizes_are_those_of_the_vllm_that_is_installed() -> None:
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn", reason=needs.VLLM)
    from actors.engine.vllm import CPU_HEAD_SIZES

    assert tuple(backend.CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
