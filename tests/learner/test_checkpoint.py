import errno
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.checkpoint import TrainerState, best, forget_best, identity, keep_best, latest, read_state, save
from learner.policy import load_policy
from services.cli.evaluate import evaluation_config
from services.cli.export import export
from services.config import Config, dump_config
from services.errors import CheckpointFailed
from services.model_folder import read_weights


def write(folder, config, version=2, *, engine=lambda path: None, engine_bytes=0, keep=2, weights=None):
    state = TrainerState(version, {"cursor": 3, "outstanding": [1]}, 1.5, identity(config))
    return save(
        folder,
        state,
        weights=weights or {"weight": torch.ones(2)},
        model=config.model.path,
        engine=engine,
        engine_bytes=engine_bytes,
        keep=keep,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path, tiny_config):
    written = write(tmp_path / "checkpoints", tiny_config, engine=lambda path: (path / "part").write_text("x"))
    assert latest(tmp_path / "checkpoints") == written
    assert written.name == "000002"
    assert (written / "engine" / "part").read_text() == "x"
    state = read_state(written, tiny_config)
    assert state == TrainerState(2, {"cursor": 3, "outstanding": [1]}, 1.5, identity(tiny_config))


def test_policy_folder_is_a_model_with_its_tokenizer(tmp_path, tiny_config):
    policy = load_policy(tiny_config.model.path, "float32", 1.0)
    weights = {name: parameter.detach() + 0.5 for name, parameter in policy.lm.named_parameters()}
    folder = write(tmp_path, tiny_config, weights=weights) / "policy"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name])
    assert (folder / "tokenizer.json").exists()


def test_newest_are_kept(tmp_path, tiny_config):
    for version in (2, 4, 6):
        write(tmp_path / "c", tiny_config, version)
    assert names(tmp_path / "c") == ["000004", "000006"]


def test_best_policy_is_kept_until_a_checkpoint_covers_a_better_one(tmp_path, tiny_config):
    folder, model = tmp_path / "c", tiny_config.model.path
    weights = read_weights(model)
    write(folder, tiny_config, 2)
    assert best(folder) is None
    for version, success in ((2, 0.25), (5, 0.5), (6, 0.75)):
        keep_best(folder, version, success, weights, model)
        assert best(folder) == (folder / f"best-{version:06d}", success)
    assert names(folder) == ["000002", "best-000002", "best-000006"]  # update 5's would be done again with update 6
    assert latest(folder).name == "000002"
    load_policy(folder / "best-000006", "float32", 1.0)

    write(folder, tiny_config, 4)
    assert names(folder) == ["000002", "000004", "best-000002", "best-000006"]
    forget_best(folder, after=4)  # as a run does that goes on from update 4
    assert best(folder) == (folder / "best-000002", 0.25)

    keep_best(folder, 5, 0.5, weights, model)
    write(folder, tiny_config, 6)
    assert names(folder) == ["000004", "000006", "best-000005"]
    keep_best(folder, 6, 0.6, weights, model)
    assert names(folder) == ["000004", "000006", "best-000006"]


def test_policy_folder_of_adapters_is_the_whole_model(tmp_path, tiny_config):
    base = read_weights(tiny_config.model.path)
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = {name + ".lora_A": torch.ones(1, 16), name + ".lora_B": torch.full((16, 1), 0.5)}
    folder = write(tmp_path, tiny_config, weights=adapter) / "policy"
    written = read_weights(folder)
    assert written.keys() == base.keys()
    torch.testing.assert_close(written.pop(name), base[name] + 0.5)
    for other, tensor in written.items():
        assert torch.equal(tensor, base[other])
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_export(tmp_path, tiny_config):
    weights = read_weights(tiny_config.model.path)
    for version in (2, 4):
        checkpoint = write(tmp_path / "run" / "checkpoints", tiny_config, version, weights=weights)
    keep_best(tmp_path / "run" / "checkpoints", 2, 0.5, weights, tiny_config.model.path)
    run = tmp_path / "run"
    played = Config.model_validate(
        {"env": {"url": "http://elsewhere:1", "max_steps": 7}, "buffer": {"redis_url": "redis://:secret@there"}}
    )
    (run / "config.yaml").write_text(dump_config(played))
    for source, option, wanted in ((run, False, "000004"), (checkpoint, False, "000004"), (run, True, "best-000002")):
        out = tmp_path / f"out-{len(names(tmp_path))}"
        assert wanted in export(source, out, best=option).parts
        load_policy(out, "float32", 1.0)
        assert "best.json" not in names(out)
        # How it plays goes with it, where and with what secrets it was trained does not.
        config = evaluation_config(None, [], [str(out)])
        assert (config.env.max_steps, config.env.url, config.buffer.redis_url) == (7, None, None)
        assert "secret" not in (out / "config.yaml").read_text()
    with pytest.raises(CheckpointFailed, match="there already"):
        export(run, out, best=False)
    with pytest.raises(CheckpointFailed, match="neither a checkpoint nor a run"):
        export(tmp_path, tmp_path / "new", best=False)


def test_incomplete_ones_are_ignored_and_swept(tmp_path, tiny_config):
    assert latest(tmp_path / "c") is None
    write(tmp_path / "c", tiny_config, 2)
    (tmp_path / "c" / ".000004.partial" / "engine").mkdir(parents=True)
    (tmp_path / "c" / ".000001.removed").mkdir()
    assert latest(tmp_path / "c").name == "000002"
    write(tmp_path / "c", tiny_config, 4)
    assert names(tmp_path / "c") == ["000002", "000004"]


def test_too_little_space_is_noticed_before_writing(tmp_path, tiny_config):
    write(tmp_path / "c", tiny_config, 2)
    with pytest.raises(CheckpointFailed, match=r"takes about .* MiB left"):
        write(tmp_path / "c", tiny_config, 4, engine_bytes=2**62)
    assert names(tmp_path / "c") == ["000002"]


@pytest.mark.parametrize("fails_with", [OSError(errno.ENOSPC, "No space left on device"), CheckpointFailed("full")])
def test_full_disk_leaves_nothing_behind(tmp_path, tiny_config, fails_with):
    def engine(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise fails_with

    write(tmp_path / "c", tiny_config, 2)
    with pytest.raises(CheckpointFailed, match="full"):
        write(tmp_path / "c", tiny_config, 4, engine=engine)
    assert names(tmp_path / "c") == ["000002"]


def test_other_runs_are_refused(tmp_path, tiny_config):
    written = write(tmp_path, tiny_config)
    other = tiny_config.model_copy(update={"run": tiny_config.run.model_copy(update={"seed": 5})})
    with pytest.raises(CheckpointFailed, match=r"written with run\.seed=0, this run has run\.seed=5"):
        read_state(written, other)
    (written / "state.json").write_text("{")
    with pytest.raises(CheckpointFailed, match="cannot read"):
        read_state(written, tiny_config)
