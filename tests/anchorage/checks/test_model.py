"""`anchorage model check`: what is off with a folder, without vLLM (tests/actors/engine/test_updates.py is with it)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from anchorage.checks.preflight import Start, preflight
from anchorage.checks.tokenizer import tokenizer_findings
from anchorage.cli.main import main
from learner.rank.policy import Route, load_policy
from services.config import Config
from services.errors import ModelUnavailable, PreflightFailed
from tests.actors.engine.many_models import CONFIGS, make, write

STARTER = Path("models/starter")


def checked(capsys: pytest.CaptureFixture[str], folder: Path, code: int) -> dict[str, dict[str, str]]:
    """The findings by name, of the command's JSON."""
    arguments = ["model", "check", str(folder), "--json", "--no-engine"]
    capsys.readouterr()  # what making the model printed
    if code:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    else:
        main(arguments)
    told = json.loads(capsys.readouterr().out)
    assert told["fit"] is (code == 0)
    return {finding["name"]: finding for finding in told["findings"]}


def test_a_model_that_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, STARTER, 0)
    assert found["tokens"]["value"] == "1127 tokens, 1127 embedding rows"
    assert found["learner: path"]["value"] == "packed"
    assert {"learner: rows alone", "learner: packed rows", "learner: shared beginnings"} <= found.keys()
    assert found["LoRA"]["value"].startswith("21 layers: down_proj, ")
    assert found["vLLM"]["verdict"] == "skipped"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["model", "check", str(STARTER), "--no-engine"])
    out = capsys.readouterr().out
    assert "learner: packed rows" in out
    assert "note: the tokenizer has no chat template" in out


def test_a_model_whose_rows_go_alone_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = checked(capsys, write(tmp_path, make("gemma2")), 0)
    assert found["learner: path"]["value"] == "rows"
    assert "softcap" in found["learner: path"]["line"]


def test_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is not a folder" in checked(capsys, tmp_path / "none", 1)["folder"]["line"]
    assert "holds no config.json" in checked(capsys, tmp_path, 1)["folder"]["line"]
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    shutil.copy(STARTER / "tokenizer.json", tmp_path)
    shutil.copy(STARTER / "model.safetensors", tmp_path)
    assert checked(capsys, tmp_path, 1)["learner"]["verdict"] == "problem"


@pytest.mark.parametrize("name", ["gpt2", "llama_untied"])
def test_a_model_with_few_positions_is_checked_within_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    config = CONFIGS[name]()
    config.max_position_embeddings = 64  # GPT-2's n_positions
    checked(capsys, write(tmp_path, transformers.AutoModelForCausalLM.from_config(config)), 0)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"hidden_act": "nosuch"}, "KeyError: 'nosuch'"),
        ({"num_attention_heads": "4"}, "cannot load"),
        ({"num_key_value_heads": 2}, r"k_proj\.bias has shape \(128,\) in the weights files and \(64,\) in config"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            "the model needs code from its own folder, which is not run",
        ),
    ],
)
def test_folders_that_cannot_be_loaded_are_refused_in_one_line(
    tmp_path: Path, values: dict[str, object], line: str
) -> None:
    folder = changed(shutil.copytree(STARTER, tmp_path / "model"), "config.json", **values)
    with pytest.raises(ModelUnavailable, match=line) as raised:
        load_policy(folder, "float32", 1.0, route=Route(packed=False))
    assert "\n" not in str(raised.value)


def changed(folder: Path, name: str, **values: object) -> Path:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("file", "values", "line"),
    [
        ("config.json", {"vocab_size": 1000}, "has 1127 tokens .* the model 1000 embedding rows"),
        ("tokenizer_config.json", {"eos_token": None}, "has no eos_token"),
        ("tokenizer_config.json", {"eos_token": "<|end|>"}, "does not contain its own eos_token '<|end|>'"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused_before_a_run_starts(
    tmp_path: Path, file: str, values: dict[str, object], line: str
) -> None:
    folder = changed(shutil.copytree(STARTER, tmp_path / "model"), file, **values)
    config = Config.model_validate({"run": {"dir": tmp_path}, "model": {"path": folder}})
    with pytest.raises(PreflightFailed, match=line.replace("|", r"\|")):
        preflight(Start(config, models=(folder,), trains=True))


def test_another_end_token_than_the_model_has_is_told(tmp_path: Path) -> None:
    folder = changed(shutil.copytree(STARTER, tmp_path / "model"), "config.json", eos_token_id=[5, 7])
    (end,) = (finding for finding in tokenizer_findings(folder) if finding.name == "EOS")
    assert end.verdict == "note"
    assert "config.json has eos_token_id=[5, 7]" in end.line
