"""Weights & Biases as an extra: offline with the real package, and one clear line where something is missing."""

import sys

import pytest

from services.config.tree import TelemetryConfig
from services.telemetry import open_metrics
from services.tracking import TrackerUnavailable
from tests import needs
from tests.waiting import until


def records(data):
    """Records of a LevelDB log that fits one block: 7 bytes of head, then each with checksum, length and kind."""
    place = 7
    while place + 7 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        yield data[place + 7 : place + 7 + length]
        place += 7 + length


def history(data):
    from wandb.proto.wandb_internal_pb2 import Record

    record = Record()
    record.ParseFromString(data)
    return {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def numbers(file):
    return [items for items in map(history, records(file.read_bytes())) if items]


OFFLINE = TelemetryConfig(trackers=("wandb",), params={"wandb": {"mode": "offline", "project": "harbour"}})


def test_offline_keeps_every_number_in_the_runs_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason=needs.WANDB)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = tmp_path / "first"
    with open_metrics(folder, OFFLINE) as metrics:
        metrics.write(1, {"rollout/success_rate": 0.25})
        metrics.write(2, {"rollout/success_rate": 0.5})
    (file,) = folder.glob("wandb/offline-run-*/run-first.wandb")
    # The package's own process writes the file's end when it hears of the run's, and tells nobody that it has.
    until(lambda: len(numbers(file)) == 2)
    found = numbers(file)
    assert [(one["update"], one["rollout/success_rate"]) for one in found] == [("1", "0.25"), ("2", "0.5")]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_package_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerUnavailable, match=r"pip install 'anchorage-rl\[wandb\]'"):
        open_metrics(tmp_path, OFFLINE)


def test_online_without_a_key_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(TrackerUnavailable, match="requires a key in WANDB_API_KEY"):
        open_metrics(tmp_path, TelemetryConfig(trackers=("wandb",)))


def test_off_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_metrics(tmp_path, TelemetryConfig(trackers=())) as metrics:
        metrics.write(1, {"a": 1.0})
