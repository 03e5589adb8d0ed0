"""The environments of a run: found at their addresses, or started here; started again when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from anchorage.runs.stack import Stack, _write_config
from services.buffer import Buffer
from services.buffer.keys import Keys, ticket_field
from services.config.tree import Config
from services.errors import EnvironmentUnavailable
from services.schemas import Task, Ticket
from tests import needs
from tests.env_servers.launching import launch
from tests.processes import ROOT


def test_a_mix_of_an_environment_with_two_servers_and_one_started_here(tmp_path: Path) -> None:
    with ExitStack() as opened:
        urls = []
        for number in range(2):
            urls.append(opened.enter_context(launch(tmp_path / f"server-{number}")).url)
        counting = {"name": "counting", "urls": urls, "weight": 3}
        config = Config.model_validate({"run": {"dir": tmp_path}, "envs": [counting, {"name": "alfworld"}]})
        stack = Stack(config)
        opened.callback(lambda: stack.__exit__())
        config.run.folder.mkdir()
        found = stack._start_environments(config.run.folder)
        assert found["counting"] == tuple(urls)
        assert len(found["alfworld"]) == 1
        assert {"counting/train", "alfworld/train"} <= stack.splits.keys()
        assert stack.splits["alfworld/train"] > 0
        server = stack._servers["alfworld"]
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        stack._restart_environments()
        assert stack._servers["alfworld"].alive
        assert stack._servers["alfworld"].url == server.url


def test_servers_of_one_environment_with_other_tasks_are_refused(tmp_path: Path) -> None:
    with launch(tmp_path / "one") as one, launch(tmp_path / "two", "tests.env_servers.counting:Retold") as two:
        counting = {"name": "counting", "urls": [one.url, two.url]}
        config = Config.model_validate({"run": {"dir": tmp_path}, "env": counting})
        with pytest.raises(EnvironmentUnavailable, match=r"fingerprint is '' at .* and 'other' at") as caught:
            Stack(config)._start_environments(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_server_of_another_environment_is_refused(tmp_path: Path) -> None:
    with launch(tmp_path / "server") as server:
        config = Config.model_validate({"run": {"dir": tmp_path}, "env": {"url": server.url}})
        with pytest.raises(EnvironmentUnavailable, match="serves counting, not alfworld"):
            Stack(config)._start_environments(tmp_path)


def test_a_configuration_with_a_credential_is_its_owners_alone(tmp_path: Path) -> None:
    for url, private in ((None, False), ("redis://:secret@there", True)):
        _write_config(tmp_path / "config.yaml", Config.model_validate({"buffer": {"redis_url": url}}))
        assert ((tmp_path / "config.yaml").stat().st_mode & 0o077 == 0) is private


def test_a_damaged_group_is_removed_when_the_name_is_taken(tmp_path: Path, redis_url: str, run_name: str) -> None:
    """Else the run would wait for its lost ticket until it is stalled."""
    config = Config.model_validate({"run": {"dir": tmp_path, "name": run_name}, "buffer": {"redis_url": redis_url}})
    config.run.folder.mkdir()
    with ExitStack() as opened:
        stack = Stack(config, resume=True)
        opened.callback(lambda: stack.__exit__())
        stack.buffer = Buffer.connect(redis_url, run_name, config.buffer)
        opened.callback(stack.buffer.close)
        stack._own_name(config.run.folder)
        task = Task(env="e", split="s", index=0)
        stack.buffer.issue([Ticket(group=g, member=m, group_size=2, task=task, seed=m) for g in (0, 1) for m in (0, 1)])
        stack.buffer.release_owner()
        stack.buffer._client.zrem(Keys(run_name)["queue"], ticket_field("train", 0, 1))
        stack._own_name(config.run.folder)
        assert stack.buffer.known("train") == {1}


ONE_CARD = """
import ray
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from anchorage.runs import stack
from services.config import Config

NvidiaGPUAcceleratorManager.get_current_node_num_accelerators = staticmethod(lambda: 1)
for options in ({"num_gpus": None}, {}):
    ray.init(**(stack._own_cluster(Config()) | options), log_to_driver=False, logging_level="ERROR")
    print(ray.cluster_resources().get("GPU", 0))
    ray.shutdown()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason=needs.NO_GPU)
def test_a_card_that_torch_cannot_use_is_not_counted() -> None:
    """Ray counts cards by NVML: with a CPU build of torch, actors and ranks would ask for one and never start."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_CARD], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["1.0", "0"], done.stderr


WORKERS_PATH = """
import ray

from anchorage.runs import stack
from services.config import Config

ray.init(**stack._own_cluster(Config()), log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=0)
def where():
    import actors.pool

    return actors.__file__


print(ray.get(where.remote()))
ray.shutdown()
"""


def test_workers_find_ours_where_the_project_has_packages_of_our_names(tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-c", WORKERS_PATH],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == [str(ROOT / "actors" / "__init__.py")], done.stderr
