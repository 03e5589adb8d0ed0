"""`rollout.engine` takes vLLM's arguments, and refuses those unknown, of another type, or the project's to set."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from actors.engine.arguments import RESERVED, engine_arguments, problems
from actors.engine.vllm import GPU_BATCH_TOKENS, VllmCore
from anchorage.checks.preflight import Start, preflight
from services.config import Config
from services.config.tree import ModelConfig, RolloutConfig
from services.errors import PreflightFailed
from tests import needs

STARTER = Path("models/starter")


def lines(**given: Any) -> list[str]:
    return list(problems(given, 128, on_cpu=True))


@pytest.mark.parametrize(
    "given",
    [
        {"kv_cache_dtype": "fp8", "quantization": "fp8"},
        {"attention_backend": "FLASHINFER"},
        {"attention_backend": "flash_attn"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"max_num_batched_tokens": 16_384, "enforce_eager": True, "watermark": 1},
        {"compilation_config": {"mode": 3}},
        {"block_size": None},
        {"block_size": 64},
        {},
    ],
)
def test_arguments_of_vllm_are_taken(given: dict[str, Any]) -> None:
    assert lines(**given) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_cache_dtyp", "fp8", "vLLM has no such argument, did you mean kv_cache_dtype?"),
        ("kv_cache_dtype", "fp9", "got 'fp9', did you mean fp8?"),
        ("attention_backend", "FLASHINFR", "got 'FLASHINFR', did you mean FLASHINFER?"),
        ("max_num_batched_tokens", "many", "must be a whole number or null, got 'many'"),
        ("max_num_batched_tokens", True, "must be a whole number or null, got true"),
        ("max_num_batched_tokens", 64, "is below the 128 requests at the same time"),
        ("block_size", 7, "on CPUs takes blocks of a multiple of 32 tokens; use 32"),
        ("block_size", 48, "of a multiple of 32 tokens; use 64"),
        ("block_size", 0, "use 32"),
        ("enforce_eager", 1, "must be true or false, got 1"),
        ("speculative_config", "ngram", "must be a section or null, got 'ngram'"),
        ("quantization", 8, "got 8"),
        ("seed", 1, "cannot be set here: run.seed sets it"),
        ("model", "/m", "the model is the folder of model.path"),
        ("logprobs_mode", "raw_logprobs", "the learner needs log-probabilities"),
        ("data_parallel_size", 2, "an engine is one process"),
        ("enable_lora", True, "adapters are added to the weights"),
        ("worker_cls", "a.B", "weights are updated by the project's own transfer"),
    ],
)
def test_mistakes_are_one_line_with_the_reason(name: str, value: object, message: str) -> None:
    (line,) = lines(**{name: value})
    assert line.startswith(f"rollout.engine.{name}")
    assert message in line
    assert len(line) < 300


def test_names_and_types_are_those_of_the_installed_vllm() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils", reason=needs.VLLM)
    known = engine_arguments()
    assert known.keys() == {field.name for field in fields(arg_utils.EngineArgs)}
    assert RESERVED.keys() <= known.keys()
    # Not None, which some of vLLM's own annotations do not allow.
    plain = (bool, int, float, str)
    defaults = {
        field.name: field.default.name if isinstance(field.default, Enum) else field.default
        for field in fields(arg_utils.EngineArgs)
        if field.default is not MISSING and isinstance(field.default, (*plain, Enum))
    }
    assert len(defaults) > 50
    assert [name for name, value in defaults.items() if not known[name].accepts(value)] == []


def test_without_vllm_names_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.engine import arguments

    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    engine_arguments.cache_clear()
    try:
        assert lines(kv_cache_dtyp="fp8") == []
        assert lines(seed=1) != []
    finally:
        engine_arguments.cache_clear()


def test_the_preflight_checks_before_anything_starts(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"dir": tmp_path}, "rollout": {"engine": {"kv_cache_dtyp": "fp8"}}})
    with pytest.raises(PreflightFailed, match=r"rollout\.engine\.kv_cache_dtyp: vLLM has no such argument"):
        preflight(Start(config, models=(STARTER,)))


def test_reading_the_arguments_does_not_import_vllm() -> None:
    code = "import sys; from actors.engine.arguments import engine_arguments; n = len(engine_arguments())\n"
    code += "print(n > 0, sorted({'vllm', 'torch'} & sys.modules.keys()))"
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert told.stdout == "True []\n"


def test_a_recipe_changes_what_the_project_only_suggests() -> None:
    core = VllmCore(ModelConfig(path=STARTER), RolloutConfig(engine={"max_num_batched_tokens": 4096, "watermark": 0.1}))
    further = core._further(cpu=False)
    assert (further["max_num_batched_tokens"], further["watermark"]) == (4096, 0.1)
    plain = VllmCore(ModelConfig(path=STARTER), RolloutConfig())
    assert plain._further(cpu=False)["max_num_batched_tokens"] == GPU_BATCH_TOKENS


def test_blocks_are_smaller_on_gpus() -> None:
    assert list(problems({"block_size": 48}, 1, on_cpu=False)) == []
    [line] = problems({"block_size": 40}, 1, on_cpu=False)
    assert line.endswith("on GPUs takes blocks of a multiple of 16 tokens; use 32")
