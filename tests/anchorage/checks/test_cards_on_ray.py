"""Whose cards the nodes of a cluster have, asked of a real head by a process that does not join it, with a token."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.processes import ROOT

CLUSTER = """
import json
import subprocess
import sys

import ray

ray.init(
    address="local",
    num_cpus=0,
    resources={"rollout": 2, "card/GPU-a": 1, "card/GPU-b": 1},
    include_dashboard=False,
    log_to_driver=False,
    logging_level="ERROR",
)
head = ray.get_runtime_context().gcs_address
asking = '''
import json
import sys

from anchorage.checks import cards

nodes = cards.nodes_at(sys.argv[1])
answers = [cards.taken([card], "rollout", nodes) for card in ("GPU-b", "GPU-c")]
print(json.dumps([[sorted(name for name in node["Resources"] if "card" in name) for node in nodes], *answers]))
'''
asked = subprocess.run([sys.executable, "-c", asking, head], capture_output=True, text=True, check=True)
from anchorage.checks import cards

one = ray.nodes()[0]
other = {**one, "Resources": {"learner": 1.0, "card/GPU-a": 1.0}}
clashes = [cards.clash(nodes, share=share) for nodes in ([one], [one, other]) for share in (False, True)]
print(json.dumps([*json.loads(asked.stdout), *clashes]))
ray.shutdown()
"""


def test_the_cards_of_a_clusters_nodes_are_known_without_joining_it() -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    offered, taken, free, *clashes = json.loads(done.stdout)
    assert offered == [["card/GPU-a", "card/GPU-b"]]
    assert taken.startswith("card GPU-b is in use by ")
    assert free is None
    assert [clash is None for clash in clashes] == [True, True, False, True]
