import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anchorage.runs.evaluation import evaluation_config
from anchorage.runs.export import export_policy
from learner.checkpoint import (
    TrainerState,
    best,
    forget_best,
    identity,
    keep_best,
    latest,
    newest_intact,
    read_state,
    save,
    set_aside_after,
    whole_policy,
)
from learner.checkpoint import export_policy as write_policy
from learner.rank.policy import load_policy
from services.config import Config, dump_config
from services.errors import CheckpointFailed, ModelUnavailable
from services.model_folder import check_model_folder, read_weights


def writes(weights, model):
    """What writes a policy with these weights into a folder."""
    return lambda path: write_policy(path, whole_policy(weights, model), model)


def write(folder, config, version=2, *, engine=lambda path: None, nbytes=0, keep=2, weights=None):
    state = TrainerState(version, {"cursor": 3, "outstanding": [1]}, 1.5, identity(config))
    return save(
        folder,
        state,
        engine=engine,
        policy=writes(weights or {"weight": torch.ones(2)}, config.model.path),
        nbytes=nbytes,
        keep=keep,
        run=config.run.name,
        ranks=1,
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
        keep_best(folder, version, success, writes(weights, model))
        assert best(folder) == (folder / f"best-{version:06d}", success)
    assert names(folder) == ["000002", "best-000002", "best-000006"]  # update 5's would be done again with update 6
    assert latest(folder).name == "000002"
    load_policy(folder / "best-000006", "float32", 1.0)

    write(folder, tiny_config, 4)
    assert names(folder) == ["000002", "000004", "best-000002", "best-000006"]
    forget_best(folder, after=4)  # as a run does that goes on from update 4
    assert best(folder) == (folder / "best-000002", 0.25)

    keep_best(folder, 5, 0.5, writes(weights, model))
    write(folder, tiny_config, 6)
    assert names(folder) == ["000004", "000006", "best-000005"]
    keep_best(folder, 6, 0.6, writes(weights, model))
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
    keep_best(tmp_path / "run" / "checkpoints", 2, 0.5, writes(weights, tiny_config.model.path))
    run = tmp_path / "run"
    played = Config.model_validate(
        {"env": {"url": "http://elsewhere:1", "max_steps": 7}, "buffer": {"redis_url": "redis://:secret@there"}}
    )
    (run / "config.yaml").write_text(dump_config(played))
    for source, option, wanted in ((run, False, "000004"), (checkpoint, False, "000004"), (run, True, "best-000002")):
        out = tmp_path / f"out-{len(names(tmp_path))}"
        assert wanted in export_policy(source, out, best=option).parts
        load_policy(out, "float32", 1.0)
        assert "best.json" not in names(out)
        # How it plays goes with it, where and with what secrets it was trained does not.
        config = evaluation_config(None, [], [str(out)])
        assert (config.env.max_steps, config.env.url, config.buffer.redis_url) == (7, None, None)
        assert "secret" not in (out / "config.yaml").read_text()
    with pytest.raises(CheckpointFailed, match="exists and is not an empty folder"):
        export_policy(run, out, best=False)
    with pytest.raises(CheckpointFailed, match="neither a checkpoint nor a run"):
        export_policy(tmp_path, tmp_path / "new", best=False)


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
        write(tmp_path / "c", tiny_config, 4, nbytes=2**62)
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
    harder = tiny_config.model_copy(update={"env": tiny_config.env.model_copy(update={"params": {"size": 5}})})
    with pytest.raises(CheckpointFailed, match=r"env\.params=None, this run has env\.params=.*'size': 5"):
        read_state(written, harder)
    renamed = tiny_config.model_copy(update={"run": tiny_config.run.model_copy(update={"name": "other"})})
    with pytest.raises(CheckpointFailed, match=f"written by the run {tiny_config.run.name}, not by other"):
        read_state(written, renamed)


def engine_of(version):
    """Files like those of two ranks, whose content depends on the version."""

    def write_engine(folder):
        for name in ("state-00001.safetensors", "state-00002.safetensors", "random-00000.safetensors", "engine.json"):
            (folder / name).write_bytes(f"{name} of {version}".encode() * 50)

    return write_engine


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, tiny_settings):
    """Checkpoints of updates 2 and 4, to copy."""
    config = Config.model_validate(tiny_settings)
    folder = tmp_path_factory.mktemp("two") / "c"
    weights = read_weights(config.model.path)
    for version in (2, 4):
        changed = {name: tensor + version for name, tensor in weights.items()}
        write(folder, config, version, engine=engine_of(version), weights=changed)
    return folder


def flip_first(file, other):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def flip_middle(file, other):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x80
    file.write_bytes(content)


def truncate(file, other):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file, other):
    file.write_bytes(b"")


def append(file, other):
    file.write_bytes(file.read_bytes() + b"\0")


def remove(file, other):
    file.unlink()


def take_the_others(file, other):
    file.write_bytes(other.read_bytes())


def fill_with_zeros(file, other):
    file.write_bytes(bytes(len(file.read_bytes())))


FILES = (
    "manifest.json",
    "state.json",
    "engine/engine.json",
    "engine/random-00000.safetensors",
    "engine/state-00001.safetensors",
    "engine/state-00002.safetensors",
    "policy/config.json",
    "policy/generation_config.json",
    "policy/model.safetensors",
    "policy/tokenizer.json",
)
DAMAGES = (flip_first, flip_middle, truncate, empty, append, remove, take_the_others, fill_with_zeros)


def test_every_file_of_a_checkpoint_is_damaged_below(two_checkpoints):
    written = two_checkpoints / "000004"
    assert {str(file.relative_to(written)) for file in written.rglob("*") if file.is_file()} == {*FILES}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_used(two_checkpoints, tmp_path, name, damage, caplog):
    folder = shutil.copytree(two_checkpoints, tmp_path / "c")
    file, other = folder / "000004" / name, folder / "000002" / name
    before = file.read_bytes()
    damage(file, other)
    harmless = file.exists() and file.read_bytes() == before  # the two have the same configuration and tokenizer
    found = newest_intact(folder)
    assert found.name == ("000004" if harmless else "000002")
    assert len(caplog.records) == (0 if harmless else 1)
    if not harmless:
        line = caplog.records[0].getMessage()
        assert name in line
        assert "000004 is damaged" in line
        assert "using 000002 instead" in line
        assert "\n" not in line


@pytest.mark.parametrize("part", ["engine", "policy"])
def test_a_folder_of_another_checkpoint_is_noticed(two_checkpoints, tmp_path, part, caplog):
    folder = shutil.copytree(two_checkpoints, tmp_path / "c")
    shutil.rmtree(folder / "000004" / part)
    shutil.copytree(folder / "000002" / part, folder / "000004" / part)
    assert newest_intact(folder).name == "000002"
    assert f"content of {part}/" in caplog.text


def test_what_does_not_belong_to_a_checkpoint_is_noticed(two_checkpoints, tmp_path, caplog):
    folder = shutil.copytree(two_checkpoints, tmp_path / "c")
    (folder / "000004" / ".nfs0001").touch()
    (folder / "000004" / "policy" / ".git").mkdir()
    (folder / "000004" / "policy" / ".git" / "config").touch()
    assert newest_intact(folder).name == "000004"
    (folder / "000004" / "engine" / "state-00003.safetensors").touch()
    assert newest_intact(folder).name == "000002"
    assert "engine/state-00003.safetensors is not part of it" in caplog.text
    shutil.rmtree(folder / "000004")
    shutil.copytree(folder / "000002", folder / "000006")  # whole, and another update's
    assert newest_intact(folder).name == "000002"
    assert "its manifest.json is that of update 2" in caplog.text
    shutil.rmtree(folder / "000006")
    (folder / "000008").mkdir()
    assert newest_intact(folder).name == "000002"
    assert "manifest.json is missing" in caplog.text


def test_without_an_intact_checkpoint_there_is_one_line(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "c")
    for version in ("000002", "000004"):
        (folder / version / "state.json").unlink()
    with pytest.raises(CheckpointFailed, match=r"no intact checkpoint in .*; .*state\.json is missing") as caught:
        newest_intact(folder)
    assert "\n" not in str(caught.value)
    assert newest_intact(tmp_path / "nothing") is None


def test_damaged_checkpoints_make_way_for_those_that_come(two_checkpoints, tmp_path, tiny_config):
    folder = shutil.copytree(two_checkpoints, tmp_path / "c")
    set_aside_after(folder, 2)
    assert names(folder) == ["000002", "damaged-000004"]
    write(folder, tiny_config, 3)
    assert names(folder) == ["000002", "000003"]


def test_a_damaged_score_is_no_best_policy(tmp_path, tiny_config, caplog):
    folder, model = tmp_path / "c", tiny_config.model.path
    weights = read_weights(model)
    keep_best(folder, 2, 0.5, writes(weights, model))
    score = folder / "best-000002" / "best.json"
    for content in ("{", '{"update": 2, "success_rate": 0.9}', "[]"):
        score.write_text(content)
        assert best(folder) is None
        assert "ignoring a best policy" in caplog.text
    keep_best(folder, 4, 0.25, writes(weights, model))
    assert best(folder) == (folder / "best-000004", 0.25)
    assert names(folder) == ["best-000004", "damaged-best-000002"]


def test_an_export_into_the_current_folder(tmp_path, tiny_config, monkeypatch):
    checkpoint = write(tmp_path / "c", tiny_config)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_policy(checkpoint, Path(), best=False)
    load_policy(tmp_path / "here", "float32", 1.0)
    assert names(tmp_path) == ["c", "here"]


def test_an_export_that_cannot_be_written_says_why(tmp_path, tiny_config, monkeypatch):
    def full(source, target, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    checkpoint = write(tmp_path / "c", tiny_config)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointFailed, match=r"cannot write .*out: .*No space left on device"):
        export_policy(checkpoint, tmp_path / "out", best=False)
    assert names(tmp_path) == ["c"]


def test_damaged_policies_are_not_exported(tmp_path, tiny_config):
    weights, run = read_weights(tiny_config.model.path), tmp_path / "run"
    for version in (2, 4):
        written = write(run / "checkpoints", tiny_config, version, weights=weights)
    keep_best(run / "checkpoints", 4, 0.5, writes(weights, tiny_config.model.path))
    flip_middle(written / "policy" / "model.safetensors", None)
    flip_middle(run / "checkpoints" / "best-000004" / "model.safetensors", None)
    for source, of_best in ((written, False), (run, True)):
        with pytest.raises(CheckpointFailed, match=r"model\.safetensors does not match its checksum"):
            export_policy(source, tmp_path / "out", best=of_best)
    assert not (tmp_path / "out").exists()
    assert "000002" in export_policy(run, tmp_path / "out", best=False).parts
    check_model_folder(tmp_path / "out")
    flip_middle(tmp_path / "out" / "model.safetensors", None)
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors does not match its checksum"):
        check_model_folder(tmp_path / "out")
