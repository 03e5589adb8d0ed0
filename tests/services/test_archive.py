"""The archive of groups: what was trained on comes back unchanged and within the cap, and damage is reported."""

import numpy as np
import pytest

from learner.prepare import prepare
from learner.record import group_records
from services.archive import ArchiveDamaged, GroupArchive, files, numbers_of, read_index, read_trajectory
from services.config.tree import Config
from services.schemas import Task, Ticket
from tests.learner.synthetic import play

TASK = Task(env="alfworld", split="train", index=3)


def groups_of(first, count=2, size=4):
    return {
        group: [
            play(Ticket(group=group, member=member, group_size=size, task=TASK, seed=member), version=2)
            for member in range(size)
        ]
        for group in range(first, first + count)
    }


def records_of(groups, config=None):
    config = config or Config()
    return group_records(groups, prepare(list(groups.values()), config, 0), config)


def test_the_learners_own_numbers_come_back(tmp_path):
    config, groups = Config(), groups_of(5)
    prepared = prepare(list(groups.values()), config, 0)
    GroupArchive(tmp_path, 2**20).append(7, group_records(groups, prepared, config))
    (path,) = files(tmp_path)
    index = read_index(path)
    assert index.update == 7
    assert [entry.group for entry in index.groups] == [5, 6]
    members = [member for entry in index.groups for member in entry.members]
    total = np.concatenate([numbers_of(member).total for member in members])
    assert np.array_equal(total, prepared.advantages.total)
    assert np.array_equal(np.concatenate([numbers_of(m).step_group for m in members]), prepared.table.step_group)
    played = [trajectory for group in groups.values() for trajectory in group]
    for entry, trajectory in zip(members, played, strict=True):
        back = read_trajectory(path, entry)
        assert back.ticket == trajectory.ticket
        assert [step.observation for step in back.steps] == [step.observation for step in trajectory.steps]
        assert (entry.won, entry.reward, entry.steps) == (trajectory.won, trajectory.reward, len(trajectory.steps))


def test_what_is_trained_is_what_is_kept(tmp_path):
    groups, config = groups_of(0), Config(loss={"drop_zero_advantage": False})
    prepared = prepare(list(groups.values()), config, 0)
    trained = np.concatenate([batch.advantage for own in prepared.work for step in own for batch in step.batches])
    kept = np.concatenate([numbers.total for record in records_of(groups, config) for numbers in record.numbers])
    assert set(kept.astype(np.float32)) - {0.0} == set(trained) - {0.0}


def test_the_oldest_updates_go_first(tmp_path):
    archive = GroupArchive(tmp_path, 2**20)
    archive.append(1, records_of(groups_of(0)))
    size = files(tmp_path)[0].stat().st_size
    archive = GroupArchive(tmp_path, 3 * size)
    for update in range(2, 8):
        archive.append(update, records_of(groups_of(2 * update)))
    kept = [int(path.stem) for path in files(tmp_path)]
    assert kept == list(range(8 - len(kept), 8))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * size


def test_nothing_is_kept_where_nothing_may_be(tmp_path):
    GroupArchive(tmp_path, 0).append(1, records_of(groups_of(0)))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_back_forgets(tmp_path):
    archive = GroupArchive(tmp_path, 2**20)
    for update in (1, 2, 3):
        archive.append(update, records_of(groups_of(update)))
    archive.cut(1)
    assert [path.stem for path in files(tmp_path)] == ["000001"]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "groups").write_text("in the way")
    GroupArchive(tmp_path, 2**20).append(1, records_of(groups_of(0)))
    assert "cannot archive the groups of update 1" in caplog.text


@pytest.mark.parametrize("cut", [0, 3, 7, 30, 200, -1])
def test_damage_is_said(tmp_path, cut):
    GroupArchive(tmp_path, 2**20).append(1, records_of(groups_of(0)))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    index = read_index(path)
    path.write_bytes(whole[:cut])
    with pytest.raises(ArchiveDamaged):
        read_trajectory(path, index.groups[-1].members[-1])


def test_a_damaged_index_is_said(tmp_path):
    GroupArchive(tmp_path, 2**20).append(1, records_of(groups_of(0)))
    (path,) = files(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[30] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ArchiveDamaged):
        read_index(path)
