"""A tracker never stops or slows the run: it may fail, hang or be slow."""

import logging
import threading
import time
from textwrap import dedent

import pytest

from services.config.tree import TelemetryConfig
from services.plugins import PluginError
from services.telemetry import open_metrics
from services.tracking import RunInfo, TrackerUnavailable, check, flat
from services.tracking.background import BackgroundTracker


class Recording:
    def __init__(self, run):
        self.run = run
        self.written = []
        self.closed = 0

    def write(self, step, scalars):
        self.written.append((step, scalars))

    def close(self):
        self.closed += 1


def started(made, folder, **options):
    return BackgroundTracker("mine", lambda run: made, RunInfo(folder), **options)


def test_records_arrive_in_order_and_it_is_closed_once(tmp_path):
    made = Recording(None)
    tracker = started(made, tmp_path)
    for step in range(50):
        tracker.write(step, {"a": step})
    tracker.close()
    tracker.close()
    assert made.written == [(step, {"a": float(step)}) for step in range(50)]
    assert made.closed == 1


def test_one_that_fails_costs_one_warning_and_the_records_that_failed(tmp_path, caplog):
    class Failing(Recording):
        def write(self, step, scalars):
            if step % 2:
                raise ConnectionError("no network")
            super().write(step, scalars)

    made = Failing(None)
    tracker = started(made, tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            tracker.write(step, {})
        tracker.close()
    assert [step for step, _ in made.written] == [0, 2, 4]
    [record] = caplog.records
    assert "metrics tracker mine: ConnectionError: no network" in record.getMessage()
    assert "the run continues" in record.getMessage()


def test_one_that_hangs_neither_holds_the_run_nor_its_end(tmp_path, caplog):
    released = threading.Event()

    class Hanging(Recording):
        def write(self, step, scalars):
            released.wait()

    tracker = started(Hanging(None), tmp_path, limit=3)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            tracker.write(step, {})
        assert time.monotonic() - began < 1.0
        tracker.close(timeout_s=0.2)
    assert time.monotonic() - began < 5.0
    [record] = caplog.records
    assert "queue of 3 records is full, further records are dropped" in record.getMessage()
    released.set()


def test_one_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    def make(run):
        raise OSError("refused")

    with caplog.at_level(logging.WARNING):
        tracker = BackgroundTracker("mine", make, RunInfo(tmp_path))
        tracker.write(1, {})
        tracker.close()
    assert len(caplog.records) == 1


PLUGIN = """
    class Lines:
        '''Writes lines.'''

        def __init__(self, run, params):
            self.file = (run.folder / params.get("name", "lines.txt")).open("a")
            self.file.write(f"{run.name} {run.resume_step} {run.settings}\\n")

        def write(self, step, scalars):
            self.file.write(f"{step} {scalars}\\n")

        def close(self):
            self.file.close()
"""


def plugin(folder, text=PLUGIN, **params):
    (folder / "mine.py").write_text(dedent(text))
    return TelemetryConfig.model_validate({"trackers": [f"{folder}/mine.py:Lines"], "params": params})


def test_a_tracker_of_ones_own(tmp_path):
    config = plugin(tmp_path, Lines={"name": "own.txt"})
    assert list(check(config)) == []
    with open_metrics(tmp_path / "first", config, resume_step=4, settings={"a": 1}) as metrics:
        metrics.write(5, {"loss": 1})
    assert (tmp_path / "first" / "own.txt").read_text() == "first 4 {'a': 1}\n5 {'loss': 1.0}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("class Lines:\n    def __init__(self): ...", "must take (run), but too many positional arguments"),
        ("class Lines:\n    def __init__(self, run): ...", "the class has no method 'write'"),
        ("class Lines:\n    def __init__(self, run): ...\n    def write(self): ...", "the class has no method 'close'"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(tmp_path, text, line):
    [found] = check(plugin(tmp_path, text))
    assert line in found


def test_it_may_say_that_it_cannot_work(tmp_path):
    own = PLUGIN + "\n        @staticmethod\n        def problem(params):\n            return 'lines need paper'\n"
    config = plugin(tmp_path, own)
    assert list(check(config)) == ["lines need paper"]
    with pytest.raises(TrackerUnavailable, match="lines need paper"):
        open_metrics(tmp_path, config)


def test_parameters_of_the_built_in_ones_are_checked():
    wrong = TelemetryConfig(trackers=("wandb",), params={"wandb": {"mode": "offlin", "projet": "x"}})
    assert list(check(wrong)) == [
        "telemetry.params.wandb.projet: telemetry.trackers=wandb has no such parameter, did you mean project?",
        "telemetry.params.wandb.mode: must be one of online, offline, got 'offlin', did you mean offline?",
    ]
    with pytest.raises(PluginError):
        open_metrics(None, wrong)


def test_flat_settings():
    assert flat({"a": {"b": {"c": 1}, "d": 2}, "e": 3}) == {"a.b.c": 1, "a.d": 2, "e": 3}
